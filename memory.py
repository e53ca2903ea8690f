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
slots, D value width, Q width of half a query (2Q: of a key), n = B * T tokens, M ranks that share a table."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kernels import dot, lookup, sparse_rows, triton_select, uses_triton, widen

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
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or K > 64:
        return scores.topk(K, dim=-1).indices
    if N > 256:  # where numpy's sort of a row takes ten times as long: the best of 256 each, and of these
        parts = [topk_columns(part, min(K, part.size(-1))) for part in scores.split(256, dim=-1)]
        columns = torch.cat([256 * i + part for i, part in enumerate(parts)], dim=-1)
        return columns.gather(-1, topk_columns(scores.gather(-1, columns), K))
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


def tucker_topk(s, K, core):
    """The slots of the K best of S_grid = S_row^T core S_col; S_row, S_col = s (2, H, r, n, N) -> (H, n, K).
    UltraMem's two passes. The best approximation of rank 1, core = sigma u w^T, gives a grid of products
    a[i] b[j], a = u^T S_row, b = w^T S_col. Its best lie in the K rows and columns with the largest a and b,
    or the smallest (the paper leaves out these products of two negative numbers; but u and w could as well
    be -u and -w). Among those 2 K * K the core decides. Exact if its rank is 1, and K products positive."""
    u, _, w = torch.linalg.svd(core.nan_to_num())
    ab, grids = (s * torch.stack((u[:, 0], w[0])).view(2, 1, -1, 1, 1)).sum(2), []  # (2, H, n, N)
    columns = [topk_columns(sign * ab, K) for sign in (1, -1)]  # (2, H, n, K) each
    for part in columns:
        row, col = s.gather(-1, part.unsqueeze(2).expand(-1, -1, len(core), -1, -1))  # (H, r, n, K)
        row = (row.unsqueeze(2) * core[..., None, None]).sum(1)  # core^T row; autocast rounds no such product
        grids.append(sum(row[:, r].unsqueeze(-1) * col[:, r].unsqueeze(-2) for r in range(len(core))))
    best = topk_columns(torch.stack(grids, dim=-3).flatten(-3), K)  # (H, n, K) of 2 * K * K
    i, j = torch.cat(columns, dim=-1)  # (H, n, 2K)
    return i.gather(-1, best // K) * s.size(-1) + j.gather(-1, best // K**2 * K + best % K)


@torch.library.custom_op("nanomem::select", mutates_args=())  # opaque to torch.compile
def select(scores: torch.Tensor, pairs: torch.Tensor, K: int, core: torch.Tensor | None) -> torch.Tensor:
    """Each head's K best slots, (H, n, K). scores (2, H, n, N); with UltraMem's core (2, H, r, n, N)"""
    if core is not None:
        return tucker_topk(widen(scores), K, core)
    if uses_triton(scores) and scores.size(2) > 0:
        return triton_select(scores, pairs, K)
    return product_topk(widen(scores), K, pairs)


@select.register_fake
def _(scores, pairs, K, core):
    return scores.new_empty(scores.size(1), scores.size(-2), K, dtype=torch.int64)


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
        self.out = nn.Linear(D, C, bias=False) if config.mem_gate or D != C else None

    def forward(self, x, pool):
        """x (B, T, C) -> (B, T, C)"""
        y = self.read(x.flatten(0, 1), pool).view(*x.shape[:2], -1)  # (B, T, D)
        y = y.type_as(x) if self.gate is None else y * F.silu(self.gate(x))
        return y if self.out is None else self.out(y)

    def read(self, x, pool):
        """x (n, C) -> (n, D)"""
        return pool(*self.retrieve(x))

    def retrieve(self, x):
        """x (n, C) -> slots (n, H*K) int64, weights (n, H*K): each head's K best slots and their softmax."""
        s = self.scores(x)  # (2, H, n, N)
        slots = select(s.detach(), self.pairs, self.K, None)  # (H, n, K)
        i = slots // self.N
        # A sub-key can be in several sums: gather's backward pass adds its gradients, on a GPU in any order.
        halves = s.gather(-1, torch.stack((i, slots - i * self.N)))  # (2, H, n, K)
        p = widen(halves).sum(0).softmax(-1)
        return slots.transpose(0, 1).flatten(1), p.transpose(0, 1).flatten(1)

    def scores(self, x):
        """x (n, C) -> s1 and s2, the scores of all sub-keys: (2, H, n, N)"""
        q = self.query_norm(widen(self.query(x)).view(len(x), 2 * self.H, self.Q))
        keys = self.key_norm(self.keys) / self.scale  # (2H, N, Q)
        return torch.bmm(q.transpose(0, 1), keys.transpose(1, 2)).unflatten(0, (2, self.H))


# --- other systems --------------------------------------------------------------------------------------


class PEER(MemoryLayer):
    """A million experts of one neuron (He 2024, arXiv:2407.04153). Retrieval is that of Memory+, but slot s
    holds a neuron, u_s and v_s, rows s and S + s of the pool: y = sum over slots of p gelu(u_s . x) v_s"""

    def read(self, x, pool):
        slots, weights = self.retrieve(x)  # (n, H*K)
        return pool(pool.S + slots, weights * F.gelu(pool.dot(slots, x)))


class UltraMem(MemoryLayer):
    """UltraMem (Huang et al. 2024, arXiv:2411.12364). Its parts, without which it is PKM:

    mem_rank=r     the score of slot (i, j) is S_row[:, i]^T core S_col[:, j], not a sum. Rows and columns
                   have r scores each, of r queries and sub-keys with LayerNorm; the core is learned
    mem_cores=h    slots are chosen by the sum of h cores; each weights its own h-th of a value's width
    mem_softmax    False: scores weight the values as they are
    mem_expand=E   E times the slots are addressed. A permutation maps each to a block e and a row of the
                   table; what was read of block e is multiplied by its own W_e, a part of W_o
    mem_skip       the layer reads the input of a block, and is added after a later one (GPT.hidden)"""

    def __init__(self, c):
        r, E, off = max(1, c.mem_rank), c.mem_expand, dict(mem_rank=0, mem_cores=1, mem_expand=1)
        shape = dict(mem_keys=c.mem_keys * math.isqrt(E), mem_value_dim=c.mem_value_dim * E)
        shape |= dict(mem_heads=c.mem_heads * r, mem_key_dim=c.mem_key_dim // r)
        super().__init__(replace(c, **shape, **off))
        self.r, self.E, self.softmax = r, E, c.mem_softmax
        self.core = nn.Parameter(torch.empty(c.mem_cores, r, r)) if c.mem_rank else None
        if c.mem_rank and c.mem_qk_norm:
            self.query_norm, self.key_norm = (nn.LayerNorm(self.Q, 1e-6, bias=False) for _ in range(2))

    def retrieve(self, x):
        """x (n, C) -> virtual slots (n, H*K), weights (n, h, H*K)"""
        s = self.scores(x).unflatten(1, (-1, self.r))  # (2, H, r, n, N)
        core = None if self.core is None else self.core.sum(0).detach()
        slots = select((s[:, :, 0] if core is None else s).detach(), self.pairs, self.K, core)  # (H, n, K)
        i = slots // self.N
        ij = torch.stack((i, slots - i * self.N)).unsqueeze(2).expand(-1, -1, self.r, -1, -1)
        row, col = widen(s.gather(-1, ij))  # (H, r, n, K)
        if core is not None:  # products that autocast does not round
            row = (row[:, None, :, None] * self.core[..., None, None]).sum(2)  # (H, h, r, n, K)
        p = row + col if core is None else (row * col.unsqueeze(1)).sum(2)  # (H, h, n, K)
        p = p.softmax(-1) if self.softmax else p
        return slots.transpose(0, 1).flatten(1), p.permute(2, 1, 0, 3).flatten(2)

    def read(self, x, pool):
        """x (n, C) -> (n, E*D)"""
        slots, weights = self.retrieve(x)
        n, h, _ = weights.shape
        places, order = (slots if self.E == 1 else pool.permutation[slots].long()).sort(-1)  # by block
        weights = weights.gather(-1, order.unsqueeze(1).expand_as(weights))
        rows = (places % pool.S)[:, None] + pool.S * torch.arange(h, device=x.device)[:, None]  # (n, h, H*K)
        lengths = F.one_hot(places // pool.S, self.E).sum(1, keepdim=True)  # (n, 1, E), slots of each block
        offsets = F.pad(lengths.expand(n, h, self.E).flatten().cumsum(0), (1, 0))
        y = pool(rows.flatten(), weights.flatten(), offsets)  # (n * h * E, D/h)
        return y.view(n, h, self.E, -1).transpose(1, 2).flatten(1)

    def auxiliary(self):
        """1e-3 / (r - 1) times the sum of max(0, sigma - 0.15)^2 over the core's singular values but the
        largest: the smaller they are, the less the pass of rank 1 misses."""
        core = torch.zeros(1, 1, 1) if self.core is None else self.core
        excess = (torch.linalg.svdvals(core.sum(0).nan_to_num())[1:] - 0.15).relu()
        return 1e-3 * excess.square().sum() / max(1, self.r - 1)


# --- the values ---------------------------------------------------------------------------------------------


class ValuePool(nn.Module):
    """The values of S slots, width D, that all memory layers of a model read. The GPT hands it to them. If a
    slot has several (PEER, UltraMem's cores) they are in as many tables of S rows, one below the other.
    With a group of M processes it is sharded over them by width (Memory Layers at Scale, section 3): each has
    all S rows, but D/M of their columns. All must then call it together, with equally many tokens."""

    def __init__(self, S, D, dtype=torch.float32, group=None, tables=1, expand=1):
        super().__init__()
        self.S, self.D, self.group, self.usage = S, D, group, None
        i, self.M = (group.rank(), group.size()) if group else (0, 1)
        self.columns = slice(i * D // self.M, (i + 1) * D // self.M)  # those that are here
        self.values = nn.Parameter(torch.empty(tables * S, D // self.M, dtype=dtype))
        if expand > 1:  # of UltraMem's virtual slots; kept in checkpoints
            self.register_buffer("permutation", torch.empty(expand * S, dtype=torch.int32))
        self.accumulator = None  # after collect_gradients(): the sum of gradients, and which rows have one
        self.chosen = None  # after choose(): which rows may change, (tables * S) uint8; None: all

    @torch.no_grad()
    def initialize(self, std):
        """The same numbers however the table is sharded."""
        for rows in self.values.split(4096):  # a multiple of 16: as if drawn in one piece
            rows.copy_(torch.empty(len(rows), self.D, device=rows.device).normal_(std=std)[:, self.columns])
        for permutation in self.buffers():
            permutation.copy_(torch.randperm(len(permutation), device=permutation.device))

    def forward(self, rows, weights, offsets=None):
        """rows of the tables (n, H*K), weights (n, H*K) -> (n, D); with offsets as in lookup"""
        if self.usage is not None:
            self.usage.add(rows % self.S, weights)
        if self.group is not None:
            return torch.compiler.disable(sharded_lookup)(self, rows, weights, offsets)
        return lookup(self.values, rows, weights, self.accumulator, offsets)

    def dot(self, rows, x):
        """rows (n, H*K), x (n, D) -> their products (n, H*K)"""
        if self.group is not None:
            return torch.compiler.disable(sharded_dot)(self, rows, x)
        return dot(self.values, rows, x, self.accumulator)

    def collect_gradients(self):
        """From now on layers and micro-steps add to one gradient, of the values' dtype (bfloat16 loses
        a little: bench/README.md). combine_gradient() takes the sum out."""
        touched = torch.zeros(len(self.values), dtype=torch.uint8, device=self.values.device)
        self.accumulator = torch.zeros_like(self.values), touched

    def choose(self, slots):
        """From now on only the values of these slots (int64; None: of all) have a gradient."""
        self.chosen = torch.zeros(len(self.values), dtype=torch.uint8, device=self.values.device)
        self.chosen.view(-1, self.S)[:, slots] = 1  # None indexes all

    @torch.no_grad()
    def combine_gradient(self, replicas=None, world=1):
        """Put what was collected, averaged over `world` ranks, into values.grad: a coalesced sparse tensor of
        the rows that any of them has read. replicas: the group of those that hold the same columns; all get
        the same bits. They exchange a byte a slot, and then the gradients of those rows."""
        gradient, touched = self.accumulator
        if replicas:
            dist.all_reduce(touched, dist.ReduceOp.MAX, group=replicas)
        if self.chosen is not None:
            touched &= self.chosen  # what the others have collected is never taken out
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
        self.usage = Usage(self.S, self.values.device)
        yield self.usage
        self.usage = None


class Usage:
    """How evenly the slots are read (1907.05242, section 4.4), while ValuePool.record_usage() is on."""

    def __init__(self, S, device):
        self.reads, self.mass = (torch.zeros(S, device=device) for _ in range(2))  # times, absolute weights

    def add(self, slots, weights):
        self.reads.index_put_((slots.flatten(),), torch.ones((), device=weights.device), accumulate=True)
        self.mass.index_put_((slots.flatten(),), weights.detach().float().abs().flatten(), accumulate=True)

    def summary(self):
        """used: share of slots that were read. kl, kl_weighted: KL from uniform in nats, log S + sum p log p,
        of reads and of weights (0 = even, log S = one slot). top1: share of reads of the busiest 1%."""

        def kl(counts):
            p = counts.cpu().double()
            p /= p.sum().clamp(min=1e-9)
            return math.log(len(p)) + torch.xlogy(p, p).sum().item()

        top = self.reads.topk(max(1, len(self.reads) // 100)).values.sum() / self.reads.sum().clamp(min=1)
        used = (self.reads > 0).float().mean().item()
        return {"used": used, "kl": kl(self.reads), "kl_weighted": kl(self.mass), "top1": top.item()}


def score_slots(c, background):
    """TF-IDF of slots, (S): what new data need more than others do (Lin et al. 2025, arXiv:2510.15103):

        c(i) / sum of c * log((|B| + 1) / (1 + number of background batches that read slot i))

    c (S): how often the new data read a slot, or how much they would change it. background: for each batch
    of B how often it reads each slot, (S)"""
    batches, containing = 0, torch.zeros_like(c)
    for reads in background:
        batches, containing = batches + 1, containing + (reads > 0)
    return c / c.sum() * torch.log((batches + 1) / (1 + containing))


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


def tell_all(x, pool):
    """x (n, ...) of this rank's tokens -> (M * n, ...), of all ranks'; its gradient sums over the ranks."""
    return Exchange.apply(x.expand(pool.M, *x.shape), pool.group).flatten(0, 1)


def sharded_lookup(pool, rows, weights, offsets=None):
    """As ValuePool.forward. Each rank tells all what its tokens read, and looks up its columns for all of
    them; an all-to-all returns each token's D/M columns to its rank.
    For n tokens of k slots a rank sends (M - 1) n (4 k + 4 k + e D / M) bytes forward, (M - 1) n (e D / M +
    4 k) backward, at e bytes a number: nothing depends on S. The columns' gradients are complete."""
    rows, weights = tell_all(rows.int(), pool), tell_all(weights, pool)
    offsets = None if offsets is None else F.pad(tell_all(offsets.diff(), pool).cumsum(0), (1, 0))
    y = lookup(pool.values, rows, weights, pool.accumulator, offsets)  # (M * n, D/M)
    return Exchange.apply(y.unflatten(0, (pool.M, -1)), pool.group).transpose(0, 1).flatten(1)  # (n, D)


def sharded_dot(pool, rows, x):
    """As ValuePool.dot. Each rank multiplies its columns of all tokens' x; the products are summed."""
    x = Exchange.apply(x.unflatten(1, (pool.M, -1)).transpose(0, 1), pool.group).flatten(0, 1)
    z = dot(pool.values, tell_all(rows.int(), pool), x, pool.accumulator)  # (M * n, H*K)
    return Exchange.apply(z.unflatten(0, (pool.M, -1)), pool.group).sum(0)


def whole_table(pool, part):
    """part (S, D/M), the columns of values or moments that are here -> all (S, D), on the CPU, in rank 0."""
    if pool.group is None:
        return part
    table = torch.empty(len(part), pool.D, dtype=part.dtype) if dist.get_rank() == 0 else None
    for start in range(0, len(part), 2**16):  # in pieces that fit beside all else that a GPU holds
        piece = part[start : start + 2**16].contiguous()
        pieces = [torch.empty_like(piece) for _ in range(pool.M)]
        dist.all_gather(pieces, piece, group=pool.group)
        if table is not None:
            table[start : start + 2**16] = torch.cat(pieces, dim=1)
    return table
