"""Memory layers: a feed-forward network that reads a few rows of a very large table instead of multiplying by a matrix.

Memory Layers at Scale (Berges et al. 2024, arXiv:2412.09764), on the product keys of Lample et al. 2019 (arXiv:1907.05242).
For one token x, and for each of H heads:

    q1, q2  = the two halves of W_q x                                    query
    s1, s2  = keys1 q1, keys2 q2                                         one score for each of N sub-keys, twice
    slots   = the K best of the S = N * N sums s1[i] + s2[j]             slot i * N + j; found without making the S sums
    p       = softmax of those K sums                                    weights
    y       = sum over heads and their slots of p[slot] * values[slot]   the lookup (kernels.py)
    out     = W_o (y * silu(W_g x))                                      silu gate, the "+" of Memory+

Memory+ further normalises q1, q2 and the sub-keys (then dividing scores by the square root of Q), and lets several layers
read one pool of values. Without gate, W_o and norms, in one layer, this is the product-key memory (PKM) of 2019, except that
it normalised queries over the batch.

Letters: B batch, T time, C model width, H heads, K slots a head reads (top-k), N sub-keys a half, S = N * N slots,
D value width, Q width of half a query (a full key is 2Q wide), n = B * T tokens.
Read in this order: product_topk, MemoryLayer.forward, ValuePool.
"""

import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels import lookup


def topk_columns(scores, K):
    """Columns of the K largest of each row, largest first. scores (..., N), finite -> (..., K) int64. Exact."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return topk_columns_numpy(scores, K)
    return scores.topk(K, dim=-1).indices


@torch.compiler.disable  # it does not trace numpy
def topk_columns_numpy(scores, K):
    """numpy's vectorised partition and sort take a third of the time of torch.topk on one core (3.7 ms against 12 ms for 16 of
    128 in 8,192 rows), but they move numbers, not pairs of number and column. So put the column into the number: a float32
    widened to float64 has 29 zero bits at its low end, worth less than the smallest difference of two float32."""
    N = scores.size(-1)
    bits = scores.double().view(torch.int64)
    packed = (bits | torch.arange(N)).view(torch.float64).numpy()
    packed.partition(N - K, axis=-1)
    best = np.sort(packed[..., N - K :], axis=-1)
    return (torch.from_numpy(best).view(torch.int64) & (2**29 - 1)).flip(-1)


def candidate_pairs(K):
    """Ranks (a, b) that can be among the K best sums of two sorted lists: (2, P) int64.

    (a, b) is beaten by all (a', b') with a' <= a and b' <= b, which are (a + 1)(b + 1) - 1 pairs. So it needs
    (a + 1)(b + 1) <= K: 119 pairs instead of 1,024 for K = 32.
    """
    return torch.tensor([(a, b) for a in range(K) for b in range(K // (a + 1))]).T


@torch.no_grad()
def product_topk(s1, s2, K, pairs):
    """The K best sums s1[i] + s2[j] of each row, best first. s1, s2 (..., N) -> i, j, both (..., K) int64.

    pairs: candidate_pairs(K). Exactly the top-k over all N * N sums, at the cost of two top-k of N and one of about K log K
    (1907.05242, section 3.2).
    """
    i, j = topk_columns(s1, K), topk_columns(s2, K)  # (..., K), best first
    a, b = pairs
    sums = s1.gather(-1, i).index_select(-1, a) + s2.gather(-1, j).index_select(-1, b)  # (..., P)
    best = topk_columns(sums, K)  # (..., K), each a number of a pair
    return i.gather(-1, a[best]), j.gather(-1, b[best])


class Usage:
    """How evenly the slots are read (1907.05242, section 4.4), counted while ValuePool.record_usage() is on."""

    def __init__(self, values):
        self.reads = torch.zeros(len(values), device=values.device)  # (S,) times a slot was read
        self.mass = torch.zeros(len(values), device=values.device)  # (S,) softmax weight it was read with

    def add(self, slots, weights):
        ones = torch.ones((), device=weights.device)
        self.reads.index_put_((slots.flatten(),), ones, accumulate=True)
        self.mass.index_put_((slots.flatten(),), weights.detach().float().flatten(), accumulate=True)

    def summary(self):
        """used: share of slots read at least once. kl, kl_weighted: KL from uniform in nats, log S + sum p log p, of reads
        and of weights (0 = even, log S = one slot). top1: share of the reads that go to the most read 1% of slots."""

        def kl(counts):
            p = counts.cpu().double()
            p /= p.sum().clamp(min=1e-9)
            return math.log(len(p)) + torch.xlogy(p, p).sum().item()

        top = self.reads.topk(max(1, len(self.reads) // 100)).values.sum() / self.reads.sum().clamp(min=1)
        used = (self.reads > 0).float().mean().item()
        return {"used": used, "kl": kl(self.reads), "kl_weighted": kl(self.mass), "top1": top.item()}


class ValuePool(nn.Module):
    """The table of S values of width D that all memory layers of a model read. The GPT owns it and hands it to them."""

    def __init__(self, S, D):
        super().__init__()
        self.values = nn.Parameter(torch.empty(S, D))
        self.usage = None

    def forward(self, slots, weights):
        """slots (n, H*K), weights (n, H*K) -> (n, D)"""
        if self.usage is not None:
            self.usage.add(slots, weights)
        return lookup(self.values, slots, weights)

    @contextlib.contextmanager
    def record_usage(self):
        """with pool.record_usage() as usage: ... model(...) ...; usage.summary()"""
        self.usage = Usage(self.values)
        try:
            yield self.usage
        finally:
            self.usage = None


def widen(x):
    """bfloat16 to float32, for norms, sums of scores and softmax; wider numbers stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MemoryLayer(nn.Module):
    """Takes the place of a block's feed-forward network. Holds queries, keys, gate and output; the values are the pool's."""

    def __init__(self, config):
        super().__init__()
        C, D, self.H, self.K = config.n_embd, config.mem_value_dim, config.mem_heads, config.mem_topk
        self.N, self.Q = config.mem_keys, config.mem_key_dim // 2
        self.query = nn.Linear(C, 2 * self.H * self.Q, bias=False)
        self.keys = nn.Parameter(torch.empty(2 * self.H, self.N, self.Q))  # half 1 of all heads, then half 2
        self.query_norm = nn.RMSNorm(self.Q, eps=1e-6) if config.mem_qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.Q, eps=1e-6) if config.mem_qk_norm else nn.Identity()
        # With both sides normalised a score is Q cos(angle): divide by sqrt(Q), as in attention, for a spread of about 1. The
        # keys begin with length 1: without norms, scores have that spread already.
        self.scale = math.sqrt(self.Q) if config.mem_qk_norm else 1.0
        self.register_buffer("pairs", candidate_pairs(self.K), persistent=False)
        self.gate = nn.Linear(C, D, bias=False) if config.mem_gate else None
        self.out = nn.Linear(D, C, bias=False) if config.mem_gate else None

    def forward(self, x, pool):
        """x (B, T, C) -> (B, T, C)"""
        B, T, C = x.shape
        slots, weights = self.retrieve(x.view(B * T, C))
        y = pool(slots, weights).view(B, T, -1)  # (B, T, D)
        return y if self.gate is None else self.out(y * F.silu(self.gate(x)))

    def retrieve(self, x):
        """x (n, C) -> slots (n, H*K) int64, weights (n, H*K) float32: each head's K best slots and their softmax."""
        n, H, K, Q = len(x), self.H, self.K, self.Q
        q = self.query_norm(widen(self.query(x)).view(n, 2 * H, Q))
        s = torch.bmm(q.transpose(0, 1), self.key_norm(self.keys).transpose(1, 2)) / self.scale  # (2H, n, N)
        s1, s2 = widen(s).chunk(2)  # (H, n, N) each
        i, j = product_topk(s1, s2, K, self.pairs)  # (H, n, K) each; a choice, without gradient
        weights = torch.softmax(s1.gather(-1, i) + s2.gather(-1, j), dim=-1)  # the gradient of the keys comes through here
        slots = i * self.N + j
        return slots.transpose(0, 1).reshape(n, H * K), weights.transpose(0, 1).reshape(n, H * K)
