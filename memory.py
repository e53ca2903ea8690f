"""Memory layers: trainable key-value lookups that read a few rows of a very large table.

Memory Layers at Scale (Berges et al. 2024, arXiv:2412.09764), on the product keys of
Lample et al. 2019 (arXiv:1907.05242). For one token x, and for each of H heads:

    q1, q2  = the two halves of W_q x                    query
    s1, s2  = keys1 q1, keys2 q2                         scores of each half's N sub-keys
    slots   = the K best of all sums s1[i] + s2[j]       slot i * N + j, of S = N * N
    p       = softmax of those K sums                    weights
    y       = sum of p[slot] * values[slot]              the lookup (kernels.py), over
                                                         all heads and their slots
    out     = W_o (y * silu(W_g x))                      silu gate, the "+" of Memory+

product_topk finds the K best sums without computing all S of them. Memory+ also
normalises q1, q2 and the sub-keys, divides scores by the square root of Q, and lets
several layers read one pool of values. The product-key memory (PKM) of 2019 is one layer
without gate, W_o and norms. (The original normalised queries over the batch.)

    pool = ValuePool(slots=256**2, dim=512)
    layer = MemoryLayer(dim=512, slots=256**2)    # in place of a feed-forward network
    optimizers = [torch.optim.AdamW(layer.parameters()), RowAdam(pool, lr=1e-3)]
    y = x + layer(norm(x), pool)                  # x (..., 512)

Call step() and zero_grad() of both optimizers in each step.

To follow a slot through the code: MemoryLayer.retrieve chooses it (select, product_topk).
collecting_lookup reads it (torch_forward, forward_kernel) and CollectingLookup.backward
computes its gradient (torch_backward, backward_kernel), which all layers and micro-steps add
to ValuePool.gradient. ValuePool.take_gradient takes out the rows that were read, and
RowAdam.update moves them.

Letters: C model width, H heads, K slots per head (top-k), N sub-keys per half, S = N * N
slots, D value width, Q width of half a query (a full key has 2Q), n tokens.
"""

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kernels import (
    collecting_lookup,
    sparse_rows,
    topk_indices,
    triton_select,
    uses_triton,
    widen,
)

# --- product keys -------------------------------------------------------------------


def candidate_ranks(K):
    """Ranks (a, b) that can be among the K best sums of two sorted lists: two rows, int64.

    (a, b) loses to every other (a', b') with a' <= a and b' <= b: (a + 1)(b + 1) - 1 pairs.
    So it needs (a + 1)(b + 1) <= K. For K = 32 this leaves 119 of 1,024 pairs."""
    ranks = []
    for a in range(K):
        for b in range(K // (a + 1)):
            ranks.append((a, b))
    return torch.tensor(ranks).T.contiguous()


def product_topk(scores, K, candidates):
    """Find the K best sums s1[i] + s2[j], best first. Returns i and j: (2, H, n, K) int64.

    scores = s1 and s2 (2, H, n, N); candidates: candidate_ranks(K). This is the exact top-k of all
    N * N sums, for two top-k over N scores and one over about K log K sums (1907.05242,
    section 3.2)."""
    _, H, n, _ = scores.shape
    places = topk_indices(scores, K)  # (2, H, n, K), best first
    best = scores.gather(-1, places)
    ranks = candidates[:, None, None].expand(2, H, n, -1)  # (2, H, n, 119) for K = 32
    sums = best.gather(-1, ranks).sum(0)  # (H, n, 119)
    winners = topk_indices(sums, K)  # (H, n, K)
    ranks = ranks.gather(-1, winners.expand(2, H, n, K))
    return places.gather(-1, ranks)


@torch.library.custom_op("nanomem::select", mutates_args=())  # opaque to torch.compile
def select(scores: torch.Tensor, candidates: torch.Tensor, K: int) -> torch.Tensor:
    """Select each head's K best slots. scores (2, H, n, N), candidates: candidate_ranks(K)
    -> their sub-keys i and j (2, H, n, K)"""
    if uses_triton(scores) and scores.size(2) > 0:
        return triton_select(scores, candidates, K)
    return product_topk(widen(scores), K, candidates)


@select.register_fake
def _(scores, candidates, K):
    _, H, n, _ = scores.shape
    return scores.new_empty(2, H, n, K, dtype=torch.int64)


# --- the layer ----------------------------------------------------------------------


class MemoryLayer(nn.Module):
    """A layer that replaces a feed-forward network. It has the weights of queries, keys, gate
    and output. forward() takes the pool that holds the values.

    dim        model width C
    slots      slots S of the pool, a square number
    heads      H
    topk       slots K that each head reads
    key_dim    width of a full key, 2Q; default: half of dim, at most 512
    value_dim  width D of the pool's values; default: dim
    gate       multiply the lookup by silu(W_g x) and project it by W_o (Memory+)
    qk_norm    RMSNorm on queries and sub-keys (Memory+)
    initialize draw the weights. If False, call initialize() or load weights later
    """

    def __init__(
        self,
        dim,
        slots,
        heads=4,
        topk=32,
        key_dim=None,
        value_dim=None,
        gate=True,
        qk_norm=True,
        initialize=True,
    ):
        super().__init__()
        if key_dim is None:
            key_dim = default_key_dim(dim)
        if value_dim is None:
            value_dim = dim
        check_shape(dim, slots, heads, topk, key_dim, value_dim)
        self.slots = slots
        self.H = heads
        self.K = topk
        self.N = math.isqrt(slots)
        self.Q = key_dim // 2
        self.D = value_dim
        self.query = nn.Linear(dim, 2 * self.H * self.Q, bias=False)
        # half 1 of all heads, then half 2
        self.keys = nn.Parameter(torch.empty(2 * self.H, self.N, self.Q))
        self.query_norm = nn.Identity()
        self.key_norm = nn.Identity()
        self.scale = 1.0  # keys start with length 1, so scores have a spread of about 1
        if qk_norm:
            self.query_norm = nn.RMSNorm(self.Q, eps=1e-6)
            self.key_norm = nn.RMSNorm(self.Q, eps=1e-6)
            # Scores are now Q cos(angle), with spread sqrt(Q). Divide by it, as in attention.
            self.scale = math.sqrt(self.Q)
        self.gate = None
        self.out = None
        if gate:
            self.gate = nn.Linear(dim, value_dim, bias=False)
        if gate or value_dim != dim:
            self.out = nn.Linear(value_dim, dim, bias=False)
        self.register_buffer("candidates", candidate_ranks(topk), persistent=False)
        if initialize:
            self.initialize()

    def initialize(self, residual=1.0):
        """Draw all weights. residual scales the output matrix, which adds to the residual
        stream."""
        self.initialize_keys()
        initialize_linear(self.query)
        if self.gate is not None:
            initialize_linear(self.gate)
        if self.out is not None:
            initialize_linear(self.out, residual)

    def initialize_keys(self):
        nn.init.normal_(self.keys, std=self.Q**-0.5)
        for norm in (self.query_norm, self.key_norm):
            if not isinstance(norm, nn.Identity):
                norm.reset_parameters()

    def forward(self, x, pool):
        """x (..., C) -> (..., C)"""
        pool.check_fits(self)
        pool.check_gradient_taken(self)
        y = self.read(x.reshape(-1, x.size(-1)), pool)  # (n, D)
        y = y.view(*x.shape[:-1], y.size(1))  # (..., D)
        return self.combine(x, y)

    def combine(self, x, y):
        """Apply gate and output matrix: x (..., C), y = lookup (..., D) -> (..., C)"""
        if self.gate is None:
            y = y.type_as(x)
        else:
            y = y * F.silu(self.gate(x))
        if self.out is not None:
            y = self.out(y)
        return y

    def read(self, x, pool):
        """x (n, C) -> (n, D)"""
        slots, weights = self.retrieve(x)
        return pool(slots, weights)

    def retrieve(self, x):
        """x (n, C) -> slots (n, H*K) int64, weights (n, H*K): each head's K best slots, and
        the softmax of their scores."""
        s = self.scores(x)  # (2, H, n, N)
        pairs = select(s.detach(), self.candidates, self.K)  # (2, H, n, K)
        # A sub-key can be in several slots, and the backward pass of gather sums its gradients.
        # On a GPU the order of this sum varies, so its last bits can differ.
        halves = s.gather(-1, pairs)  # (2, H, n, K)
        p = widen(halves).sum(0).softmax(-1)  # (H, n, K)
        i, j = pairs
        slots = i * self.N + j  # (H, n, K)
        slots = slots.transpose(0, 1).flatten(1)  # (n, H*K)
        weights = p.transpose(0, 1).flatten(1)
        return slots, weights

    def scores(self, x):
        """x (n, C) -> s1 and s2, the scores of all sub-keys: (2, H, n, N)"""
        q = widen(self.query(x)).view(len(x), 2 * self.H, self.Q)
        q = self.query_norm(q).transpose(0, 1)  # (2H, n, Q)
        keys = self.key_norm(widen(self.keys)) / self.scale  # (2H, N, Q)
        s = torch.bmm(q, keys.transpose(1, 2))  # (2H, n, N)
        return s.unflatten(0, (2, self.H))

    def flops(self):
        """Forward FLOPs per token: 2 for each multiply-add of matrix products and lookup.
        Elementwise products, norms, softmax and top-k are not counted."""
        matrices = count_linear(self)
        scores = self.keys.numel()
        lookup = self.H * self.K * self.D
        return 2 * (matrices + scores + lookup)


def default_key_dim(dim):
    """Half of the model width, at most 512, an even number."""
    half = min(dim // 2, 512)
    return max(2, half // 2 * 2)


def check_shape(dim, slots, heads, topk, key_dim, value_dim):
    """Raises ValueError for a layer that cannot be built."""
    N = math.isqrt(max(0, slots))
    for name, number in (("dim", dim), ("heads", heads), ("value_dim", value_dim)):
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1")
    if N < 1 or slots != N * N:
        near = max(1, N) ** 2
        raise ValueError(f"slots={slots}: must be a square number N * N, as {near} is")
    if not 1 <= topk <= N:
        raise ValueError(f"topk={topk}: must be from 1 to {N}, with {slots} slots")
    if key_dim < 2 or key_dim % 2 != 0:
        raise ValueError(f"key_dim={key_dim}: must be even, it has two halves")


def initialize_linear(linear, scale=1.0):
    """Draw weights that keep the spread of the input, times scale."""
    nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))


def count_linear(module):
    """Count the weights of all nn.Linear inside: one multiply-add each per token."""
    total = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            total += part.weight.numel()
    return total


# --- the values ---------------------------------------------------------------------


class ValuePool(nn.Module):
    """The values of S slots. Any number of memory layers can read them.

    slots      S
    dim        width D of a value
    dtype      float32 or bfloat16
    tables     number of values per slot (in systems/, PEER has 2, UltraMem one per core).
               values has tables * S rows. Row t * S + s is value t of slot s
    initialize draw the values from N(0, 0.02^2). If False, call initialize() or load them later

    The gradient of values is not stored in autograd's values.grad, because an optimizer like
    AdamW would then update all S rows. Instead, backward passes of all layers and micro-steps
    add it to rows of `gradient` and mark these rows in `touched`. RowAdam(pool) makes these
    two tensors. Its step() takes the gradient out with take_gradient(). Without RowAdam a
    backward pass raises RuntimeError. clip_grad_norm_ does not see this gradient."""

    def __init__(self, slots, dim, dtype=torch.float32, tables=1, initialize=True):
        super().__init__()
        self.slots = slots
        self.dim = dim
        self.values = nn.Parameter(torch.empty(tables * slots, dim, dtype=dtype))
        # Not buffers, because DistributedDataParallel would copy rank 0's to all other ranks.
        self.gradient = None  # (tables * S, D)
        self.touched = None  # (tables * S,) uint8
        self.first_read = None  # see check_gradient_taken()
        self.usage = None  # see record_usage()
        if initialize:
            self.initialize()

    @torch.no_grad()
    def initialize(self):
        for rows in self.values.split(4096):  # in pieces, to avoid a second table in float32
            rows.copy_(torch.empty(rows.shape, device=rows.device).normal_(std=0.02))

    def forward(self, rows, weights):
        """rows of the tables (n, H*K), weights (n, H*K) -> (n, D)"""
        if self.usage is not None:
            self.usage.add(rows % self.slots, weights)
        return self.lookup(rows, weights)

    def _apply(self, fn, recurse=True):
        """Move the gradient together with the values, as in to("cuda")."""
        super()._apply(fn, recurse)
        if self.gradient is not None:
            self.gradient = fn(self.gradient)
            self.touched = fn(self.touched)
        return self

    def lookup(self, rows, weights):
        """forward() without usage statistics. runtime/sharded_pool.py overrides it."""
        return collecting_lookup(self.values, rows, weights, self.gradient, self.touched)

    def collect_gradients(self):
        """Make the tensors that backward passes add to. RowAdam calls this. In bfloat16 each
        addition rounds, which loses some precision (bench/README.md)."""
        if self.gradient is None:
            device = self.values.device
            form = torch.contiguous_format
            self.gradient = torch.zeros_like(self.values, requires_grad=False, memory_format=form)
            self.touched = torch.zeros(len(self.values), dtype=torch.uint8, device=device)

    @torch.no_grad()
    def take_gradient(self):
        """Return the gradient that backward passes have added since the last call, as a
        coalesced sparse tensor of values' shape and dtype with the rows that were read. The
        pool then holds no gradient. Frozen values have none.

        Processes (torch.distributed) that each hold a copy of the table call this together.
        They exchange one byte per slot, then the gradients of rows that any of them has read.
        All get the same bits: the mean over processes."""
        if self.gradient is None:
            raise RuntimeError("no gradient was collected: make RowAdam(pool) before forward")
        if not self.values.requires_grad:  # frozen since a backward pass
            self.drop_gradient()
        world = count_processes()
        if world > 1:
            self.reduce(self.touched, dist.ReduceOp.MAX)
        rows = self.touched.nonzero().flatten()  # (R,)
        grads = self.gradient.index_select(0, rows)  # (R, D)
        if world > 1:
            self.reduce(grads, dist.ReduceOp.SUM)
            grads /= world
        self.gradient.index_fill_(0, rows, 0)
        self.touched.zero_()
        self.first_read = None
        return sparse_rows(rows, grads, self.values.shape)

    def reduce(self, x, operation):
        """Combine x of all processes that hold the same values, in place."""
        dist.all_reduce(x, operation)

    @torch.no_grad()
    def drop_gradient(self):
        """Drop the gradient that was collected."""
        if self.gradient is not None:
            self.gradient.index_fill_(0, self.touched.nonzero().flatten(), 0)
            self.touched.zero_()
        self.first_read = None

    def check_fits(self, layer):
        """Raises ValueError for a layer of another shape."""
        if layer.slots != self.slots:
            raise ValueError(f"a layer with slots={layer.slots} reads a pool of {self.slots}")
        if self.dim != layer.D:
            raise ValueError(f"a layer with value_dim={layer.D} reads values of width {self.dim}")

    def check_gradient_taken(self, layer):
        """Raises RuntimeError if the pool still holds the gradient of an earlier step. This is
        not detected under torch.compile or with frozen queries."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.touched is None:
            return
        if not self.values.requires_grad:  # take_gradient() will drop it
            return
        # Watch the first layer that reads after take_gradient(). Its query must be unchanged
        # when it reads again in another micro-step. If not, an optimizer has stepped.
        query = layer.query.weight[0]
        if self.first_read is None:
            self.first_read = (id(layer), query.detach().clone())
            return
        watched, before = self.first_read
        if watched == id(layer) and not torch.equal(query, before) and self.touched.any():
            raise RuntimeError(
                "the pool still holds the gradient of an earlier step: call step() of "
                "RowAdam(pool) in each step, or its zero_grad() to drop a gradient. Optimizers "
                "like AdamW do not take it out"
            )

    @contextlib.contextmanager
    def record_usage(self):
        """Use: `with pool.record_usage() as usage: model(x)`, then usage.summary()"""
        self.usage = Usage(self.slots, self.values.device)
        try:
            yield self.usage
        finally:
            self.usage = None


def count_processes():
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


# --- usage --------------------------------------------------------------------------


class Usage:
    """Counts reads of slots while record_usage() is on (1907.05242, section 4.4).
    reads (S,): number of reads; mass (S,): sum of their absolute weights."""

    def __init__(self, slots, device):
        self.reads = torch.zeros(slots, device=device)
        self.mass = torch.zeros(slots, device=device)

    def add(self, slots, weights):
        """slots and weights: same shape"""
        slots = slots.flatten()
        weights = weights.detach().float().abs().flatten()
        self.reads.index_put_((slots,), torch.ones_like(weights), accumulate=True)
        self.mass.index_put_((slots,), weights, accumulate=True)

    def summary(self):
        """used: share of slots that were read. kl, kl_weighted: KL divergence of reads and of
        weights from uniform, in nats (0 if even, log S if all are in one slot). top1: share of
        reads that go to the busiest 1% of slots."""
        busiest = max(1, len(self.reads) // 100)
        top = self.reads.topk(busiest).values.sum()
        return {
            "used": (self.reads > 0).float().mean().item(),
            "kl": kl_from_uniform(self.reads),
            "kl_weighted": kl_from_uniform(self.mass),
            "top1": (top / self.reads.sum().clamp(min=1)).item(),
        }


def kl_from_uniform(counts):
    """log S + sum of p log p, with p = counts / sum (S,)"""
    p = counts.cpu().double()
    p = p / p.sum().clamp(min=1e-9)
    return math.log(len(p)) + torch.xlogy(p, p).sum().item()
