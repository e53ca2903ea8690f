"""Memory layers: trainable key-value lookups that read a few rows of a very large table.

Memory Layers at Scale (Berges et al. 2024, arXiv:2412.09764), on the product keys of Lample et al. 2019
(arXiv:1907.05242). For one token x, and for each of H heads:

    q1, q2  = the two halves of W_q x                                   query
    s1, s2  = keys1 q1, keys2 q2                                        a score for each of N sub-keys, twice
    slots   = the K best of the S = N * N sums s1[i] + s2[j]            slot i * N + j; S sums are never made
    p       = softmax of those K sums                                   weights
    y       = sum over heads and their slots of p[slot] * values[slot]  the lookup (kernels.py)
    out     = W_o (y * silu(W_g x))                                     silu gate, the "+" of Memory+

Memory+ also normalises q1, q2 and the sub-keys (then dividing scores by the square root of Q), and lets
several layers read one pool of values. Without gate, W_o and norms, in one layer, this is the product-key
memory (PKM) of 2019, except that it normalised queries over the batch.

Letters: B batch, T time, C model width, H heads, K slots a head reads (top-k), N sub-keys a half, S = N * N
slots, D value width, Q width of half a query (a full key is 2Q wide), n = B * T tokens, M ranks that share a
table. """

import contextlib
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kernels import lookup, sparse_rows, triton_select, uses_triton

# --- selecting slots ----------------------------------------------------------------------------------------


def candidate_pairs(K):
    """Ranks (a, b) that can be among the K best sums of two sorted lists: (2, P) int64.

    (a, b) is beaten by all (a', b') with a' <= a and b' <= b, which are (a + 1)(b + 1) - 1 pairs. So it needs
    (a + 1)(b + 1) <= K: 119 pairs instead of 1,024 for K = 32."""
    return torch.tensor([(a, b) for a in range(K) for b in range(K // (a + 1))]).T.contiguous()


def topk_columns(scores, K):
    """Columns of the K largest of each row, largest first. scores (..., N), finite -> (..., K) int64. Exact.

    On a CPU numpy's vectorised sort takes a quarter of the time of torch.topk (3 ms against 12 on one core,
    16 of 128 in 8,192 rows), but it sorts numbers, not pairs of number and column. So put the column into the
    number: a float32 widened to float64 ends in 29 zero bits, worth less than any difference of float32."""
    N = scores.size(-1)
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or N > 512:  # where sorting all is slower
        return scores.topk(K, dim=-1).indices
    packed = scores.double().numpy()
    packed.view(np.int64)[...] |= np.arange(N)
    packed.sort(axis=-1)
    return torch.from_numpy(packed.view(np.int64)[..., : -K - 1 : -1] & (2**29 - 1))  # the last K, backwards


def product_topk(s, K, pairs):
    """The slots of the K best sums s1[i] + s2[j] of each row, best first: i * N + j, (..., K) int64.

    s (2, ..., N): s1 and s2; pairs: candidate_pairs(K). Exactly the top-k over all N * N sums, at the cost of
    two top-k of N and one of about K log K (1907.05242, section 3.2)."""
    columns = topk_columns(s, K)  # (2, ..., K), best first
    (a, b), (s1, s2), (i, j) = pairs, s.gather(-1, columns), columns
    sums = torch.cat([s1[..., r : r + 1] + s2[..., : K // (r + 1)] for r in range(K)], dim=-1)  # (..., P)
    best = topk_columns(sums, K)  # (..., K), each the index of a pair
    return i.gather(-1, a[best]) * s.size(-1) + j.gather(-1, b[best])


@torch.library.custom_op("nanomem::select", mutates_args=())  # opaque to torch.compile
def select(scores: torch.Tensor, pairs: torch.Tensor, K: int) -> torch.Tensor:
    """Each head's K best slots. scores (2, H, n, N), pairs: candidate_pairs(K) -> (H, n, K), best first"""
    if uses_triton(scores) and scores.size(2) > 0:
        return triton_select(scores, pairs, K)
    return product_topk(widen(scores), K, pairs)


@select.register_fake
def _(scores, pairs, K):
    return scores.new_empty(*scores.shape[1:3], K, dtype=torch.int64)


def widen(x):
    """bfloat16 to float32, for norms, sums of scores and softmax; wider numbers stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- the layer ----------------------------------------------------------------------------------------------


class MemoryLayer(nn.Module):
    """Replaces a feed-forward network. Has queries, keys, gate and output; the values are the pool's."""

    def __init__(self, config):
        super().__init__()
        C, D, self.H, self.K = config.n_embd, config.mem_value_dim, config.mem_heads, config.mem_topk
        self.N, self.Q = config.mem_keys, config.mem_key_dim // 2
        self.query = nn.Linear(C, 2 * self.H * self.Q, bias=False)
        self.keys = nn.Parameter(torch.empty(2 * self.H, self.N, self.Q))  # half 1 of all heads, then half 2
        self.query_norm = nn.RMSNorm(self.Q, eps=1e-6) if config.mem_qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.Q, eps=1e-6) if config.mem_qk_norm else nn.Identity()
        # With both sides normalised a score is Q cos(angle): divide by sqrt(Q), as in attention, for a spread
        # of about 1. The keys begin with length 1: without norms, scores have that spread already.
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
        """x (n, C) -> slots (n, H*K) int64, weights (n, H*K): each head's K best slots and their softmax."""
        s = self.scores(x)  # (2, H, n, N)
        slots = select(s.detach(), self.pairs, self.K)  # (H, n, K)
        i = slots // self.N
        # A sub-key can be in several of the K sums: its gradients add up in gather's backward pass, on a GPU
        # by atomics, in any order.
        halves = s.gather(-1, torch.stack((i, slots - i * self.N)))  # (2, H, n, K)
        p = widen(halves).sum(0).softmax(-1)
        return slots.transpose(0, 1).flatten(1), p.transpose(0, 1).flatten(1)

    def scores(self, x):
        """x (n, C) -> s1 and s2, the scores of all sub-keys: (2, H, n, N)"""
        q = self.query_norm(widen(self.query(x)).view(len(x), 2 * self.H, self.Q))
        keys = self.key_norm(self.keys) / self.scale  # (2H, N, Q)
        return torch.bmm(q.transpose(0, 1), keys.transpose(1, 2)).unflatten(0, (2, self.H))


# --- the values ---------------------------------------------------------------------------------------------


class ValuePool(nn.Module):
    """The table of S values of width D that all memory layers of a model read. The GPT hands it to them.

    With a group of M processes it is sharded over them by width (Memory Layers at Scale, section 3): each has
    all S rows, but D/M of their columns. All must then call it together, with equally many tokens."""

    def __init__(self, S, D, dtype=torch.float32, group=None):
        super().__init__()
        self.group, self.M = group, group.size() if group else 1
        i = group.rank() if group else 0
        self.columns = slice(i * D // self.M, (i + 1) * D // self.M)  # those that are here
        self.D, self.values = D, nn.Parameter(torch.empty(S, D // self.M, dtype=dtype))
        self.accumulator = None  # after collect_gradients(): the sum of gradients, and which rows have one
        self.usage = None

    @torch.no_grad()
    def initialize(self, std):
        """The same numbers however the table is sharded."""
        for rows in self.values.split(4096):  # a multiple of 16: as if drawn in one piece
            rows.copy_(torch.empty(len(rows), self.D, device=rows.device).normal_(std=std)[:, self.columns])

    def forward(self, slots, weights):
        """slots (n, H*K), weights (n, H*K) -> (n, D)"""
        if self.usage is not None:
            self.usage.add(slots, weights)
        if self.group is not None:
            return torch.compiler.disable(sharded_lookup)(self, slots, weights)
        return lookup(self.values, slots, weights, self.accumulator)

    def collect_gradients(self):
        """From now on layers and micro-steps add to one gradient, of the values' dtype (bfloat16 loses
        a little: bench/README.md). combine_gradient() takes the sum out."""
        touched = torch.zeros(len(self.values), dtype=torch.uint8, device=self.values.device)
        self.accumulator = torch.zeros_like(self.values), touched

    @torch.no_grad()
    def combine_gradient(self, replicas=None, world=1):
        """Put what was collected, averaged over `world` ranks, into values.grad: a coalesced sparse tensor of
        the rows that any of them has read. replicas: the group of those that hold the same columns; all get
        the same bits. They exchange a byte a slot, and then the gradients of those rows."""
        gradient, touched = self.accumulator
        if replicas:
            dist.all_reduce(touched, dist.ReduceOp.MAX, group=replicas)
        rows = touched.nonzero().flatten()
        grads = gradient.index_select(0, rows)
        if replicas:
            dist.all_reduce(grads, group=replicas)
        self.values.grad = sparse_rows(rows, grads / world if world > 1 else grads, self.values)
        gradient.index_fill_(0, rows, 0)
        touched.zero_()

    @contextlib.contextmanager
    def record_usage(self):
        """with pool.record_usage() as usage: ... model(...) ...; usage.summary()"""
        self.usage = Usage(self.values)
        try:
            yield self.usage
        finally:
            self.usage = None


class Usage:
    """How evenly the slots are read (1907.05242, section 4.4), while ValuePool.record_usage() is on."""

    def __init__(self, values):
        self.reads = torch.zeros(len(values), device=values.device)  # (S,) times a slot was read
        self.mass = torch.zeros(len(values), device=values.device)  # (S,) softmax weight it was read with

    def add(self, slots, weights):
        ones = torch.ones((), device=weights.device)
        self.reads.index_put_((slots.flatten(),), ones, accumulate=True)
        self.mass.index_put_((slots.flatten(),), weights.detach().float().flatten(), accumulate=True)

    def summary(self):
        """used: share of slots read at least once. kl, kl_weighted: KL from uniform in nats, log S + sum p
        log p, of reads and of weights (0 = even, log S = one slot). top1: share of the reads that the busiest
        1% get."""

        def kl(counts):
            p = counts.cpu().double()
            p /= p.sum().clamp(min=1e-9)
            return math.log(len(p)) + torch.xlogy(p, p).sum().item()

        top = self.reads.topk(max(1, len(self.reads) // 100)).values.sum() / self.reads.sum().clamp(min=1)
        used = (self.reads > 0).float().mean().item()
        return {"used": used, "kl": kl(self.reads), "kl_weighted": kl(self.mass), "top1": top.item()}


# --- several GPUs -------------------------------------------------------------------------------------------


class Exchange(torch.autograd.Function):
    """x (M, ...) -> (M, ...): an all-to-all. Block j goes to rank j of the group; block i of the result has
    come from rank i. The gradient of a block goes back to where the block came from: by the same exchange."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, out = group, torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.group), None


def sharded_lookup(pool, slots, weights):
    """slots, weights (n, k), k = H*K -> (n, D). Each rank tells all what its tokens read, and looks up its
    columns for all of them; an all-to-all returns each token's D/M columns to its rank.

    A rank sends (M - 1) n (4 k + 4 k + e D / M) bytes forward and (M - 1) n (e D / M + 4 k) backward, for e
    bytes a number: nothing depends on S. The columns' gradients are complete without further exchange."""
    (n, k), M = slots.shape, pool.M
    slots = Exchange.apply(slots.int().expand(M, n, k), pool.group)  # (M, n, k): of each rank's tokens
    weights = Exchange.apply(weights.expand(M, n, k), pool.group)  # expand's gradient sums over the ranks
    y = lookup(pool.values, slots.flatten(0, 1), weights.flatten(0, 1), pool.accumulator)  # (M*n, D/M)
    return Exchange.apply(y.view(M, n, -1), pool.group).transpose(0, 1).flatten(1)  # (n, M, D/M) -> (n, D)


def whole_table(pool, part):
    """part (S, D/M), the columns of values or moments that are here -> all (S, D), on the CPU, in rank 0."""
    if pool.group is None:
        return part
    first = dist.get_rank() == 0
    table = torch.empty(len(part), pool.D, dtype=part.dtype) if first else None
    for start in range(0, len(part), 2**16):  # in pieces that fit beside all else that a GPU holds
        piece = part[start : start + 2**16].contiguous()
        pieces = [torch.empty_like(piece) for _ in range(pool.M)]
        dist.all_gather(pieces, piece, group=pool.group)
        if first:
            table[start : start + 2**16] = torch.cat(pieces, dim=1)
    return table
