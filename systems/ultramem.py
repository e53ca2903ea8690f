"""UltraMem (Huang et al. 2024, arXiv:2411.12364) has the parts below. Without them, and with
mem_gate=False and mem_qk_norm=False, it is PKM.

mem_rank=r     the score of slot (i, j) is S_row[:, i]^T core S_col[:, j], not a sum. Rows and
               columns have r scores each, from r queries and sub-keys with LayerNorm. The
               core (r, r) is learned
mem_cores=h    the sum of h cores chooses the slots. Each core weights its own 1/h of a value
mem_softmax    if False, the scores weight the values without a softmax
mem_expand=E   E * S slots are addressed. A permutation maps each to a block e and a
               row of the table. The lookup of block e is multiplied by its own matrix W_e,
               a part of W_o
mem_skip       the layer reads the input of a block, and its output is added after a later one

Letters as in memory.py. Here N * N slots are addressed, E times the S slots of the pool."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from kernels import topk_indices, widen
from memory import ValuePool, count_linear, select
from runtime.options import option
from systems.memory_plus import MemoryPlus


@dataclass(frozen=True)
class UltraMemOptions:
    mem_rank: int = option(0, "ultramem: rank r of row and column scores; 0: their sum")
    mem_cores: int = option(1, "ultramem: cores h, each weights 1/h of a value", 1)
    mem_softmax: bool = option(True, "ultramem: softmax of the scores")
    mem_expand: int = option(1, "ultramem: blocks E, a square number: E times the slots", 1)
    mem_skip: int = option(0, "ultramem: add the output this many blocks later; 0: no skip")


class UltraMem(MemoryPlus):
    Options = UltraMemOptions

    @classmethod
    def from_config(cls, config):
        return cls(config)

    @staticmethod
    def make_pool(config):
        return UltraMemPool(
            slots=config.mem_keys**2,
            dim=config.mem_value_dim,
            dtype=getattr(torch, config.mem_dtype),
            cores=config.mem_cores,
            expand=config.mem_expand,
        )

    @staticmethod
    def check(config):
        check_config(config)

    def __init__(self, config):
        """config: a GPTConfig. Then call initialize() or load weights."""
        rank = max(1, config.mem_rank)
        super().__init__(
            dim=config.n_embd,
            slots=config.mem_keys**2 * config.mem_expand,
            heads=config.mem_heads * rank,  # of queries and sub-keys, r per head
            topk=config.mem_topk,
            key_dim=config.mem_key_dim // rank,
            value_dim=config.mem_value_dim * config.mem_expand,
            gate=config.mem_gate,
            qk_norm=config.mem_qk_norm,
            initialize=False,
        )
        self.r = rank
        self.heads = config.mem_heads  # H below; self.H of MemoryLayer is r * H
        self.E = config.mem_expand
        self.softmax = config.mem_softmax
        self.core = None
        if config.mem_rank > 0:
            self.core = nn.Parameter(torch.empty(config.mem_cores, rank, rank))
            if config.mem_qk_norm:
                self.query_norm = nn.LayerNorm(self.Q, 1e-6, bias=False)
                self.key_norm = nn.LayerNorm(self.Q, 1e-6, bias=False)

    def initialize_keys(self):
        super().initialize_keys()
        if self.core is not None:  # scores get spread 1 / sqrt(heads * K)
            spread = self.heads * self.K
            nn.init.normal_(self.core, std=(spread * self.r**2) ** -0.5)

    def retrieve(self, x):
        """x (n, C) -> addressed slots (n, H*K), weights (n, h, H*K)"""
        s = self.scores(x).unflatten(1, (-1, self.r))  # (2, H, r, n, N)
        pairs = self.select_slots(s.detach())  # (2, H, n, K)
        places = pairs.unsqueeze(2).expand(-1, -1, self.r, -1, -1)
        row, col = widen(s.gather(-1, places))  # (H, r, n, K) each
        if self.core is None:
            p = row + col  # (H, 1, n, K)
        else:
            p = self.bilinear_scores(row, col)  # (H, h, n, K)
        if self.softmax:
            p = p.softmax(-1)
        i, j = pairs
        slots = i * self.N + j
        slots = slots.transpose(0, 1).flatten(1)
        weights = p.permute(2, 1, 0, 3).flatten(2)
        return slots, weights

    def select_slots(self, s):
        """s (2, H, r, n, N) -> i and j of the slots (2, H, n, K)"""
        if self.core is None:
            return select(s[:, :, 0], self.candidates, self.K)
        return tucker_select(s, self.K, self.core.sum(0).detach())

    def bilinear_scores(self, row, col):
        """row^T core col for each core: (H, r, n, K) each -> (H, h, n, K)"""
        # products and sums, because autocast would round a matrix product
        row = row[:, None, :, None] * self.core[..., None, None]  # (H, h, r, r, n, K)
        row = row.sum(2)  # (H, h, r, n, K)
        return (row * col.unsqueeze(1)).sum(2)

    def read(self, x, pool):
        """x (n, C) -> (n, E*D): one lookup per block, in which the slots of all other blocks
        have weight 0."""
        slots, weights = self.retrieve(x)  # (n, H*K), (n, h, H*K)
        # sort by place in the table, to read a block's slots together
        places, order = pool.permute(slots).sort(-1)
        weights = weights.gather(-1, order.unsqueeze(1).expand_as(weights))
        blocks = places // pool.slots
        slots = places % pool.slots
        if pool.usage is not None:
            pool.usage.add(slots.unsqueeze(1).expand_as(weights), weights)
        every = torch.arange(self.E, device=x.device).unsqueeze(1)  # (E, 1)
        inside = blocks.unsqueeze(1) == every  # (n, E, H*K)
        masked = weights.unsqueeze(2) * inside.unsqueeze(1)  # (n, h, E, H*K)
        rows = pool.rows_of_cores(slots).unsqueeze(2).expand_as(masked)
        y = pool.lookup(rows.flatten(0, 2), masked.flatten(0, 2))  # (n * h * E, D/h)
        y = y.unflatten(0, masked.shape[:3])  # (n, h, E, D/h)
        return y.transpose(1, 2).flatten(1)

    def with_loss(self, x, pool):
        """x (B, T, C) -> (B, T, C), auxiliary loss"""
        return self(x, pool), self.auxiliary_loss()

    def auxiliary_loss(self):
        """1e-3 / (r - 1) times the sum of max(0, sigma - 0.15)^2 over the core's singular
        values except the largest. If they are small, the first pass misses less."""
        if self.core is None or self.r == 1:
            return 0.0
        sigma = torch.linalg.svdvals(self.core.sum(0).nan_to_num())
        excess = (sigma[1:] - 0.15).relu()
        return 1e-3 * excess.square().sum() / (self.r - 1)

    def flops(self):
        """MemoryLayer.flops, plus the two passes and the weights of the cores."""
        D = self.D // self.E
        count = count_linear(self) + self.keys.numel() + self.heads * self.K * D
        if self.core is not None:
            r = self.r
            first = 2 * self.N * r  # rank-1 scores of rows and columns
            second = 2 * self.K * r * (r + self.K)  # two grids of K * K
            weights = self.K * len(self.core) * r * (r + 1)
            count += self.heads * (first + second + weights)
        return 2 * count


class UltraMemPool(ValuePool):
    """A table of S rows for each core, with 1/h of each value. permutation (E * S,) permutes
    addressed slots and is saved in checkpoints. One block (E = 1) needs none."""

    def __init__(self, slots, dim, dtype, cores, expand):
        super().__init__(slots, dim // cores, dtype, tables=cores, initialize=False)
        self.cores = cores
        permutation = None
        if expand > 1:
            permutation = torch.empty(expand * slots, dtype=torch.int32)
        self.register_buffer("permutation", permutation)

    @torch.no_grad()
    def initialize(self):
        super().initialize()
        if self.permutation is not None:
            count = len(self.permutation)
            self.permutation.copy_(torch.randperm(count, device=self.permutation.device))

    def check_fits(self, layer):
        """Raises ValueError for a layer of another shape."""
        slots = layer.N**2 // layer.E
        D = layer.D // layer.E
        if slots != self.slots or self.dim * self.cores != D:
            theirs = f"{slots} slots of width {D}"
            own = f"{self.slots} of width {self.dim * self.cores}"
            raise ValueError(f"a layer for {theirs} reads a pool of {own}")

    def permute(self, slots):
        """Addressed slots -> places, block * S + slot of the table."""
        if self.permutation is None:
            return slots
        return self.permutation[slots].long()

    def rows_of_cores(self, slots):
        """slots (n, k) -> rows of the tables, (n, h, k)"""
        first = self.slots * torch.arange(self.cores, device=slots.device)
        return slots.unsqueeze(1) + first.unsqueeze(1)


@torch.library.custom_op("nanomem::tucker_select", mutates_args=())  # opaque to torch.compile
def tucker_select(s: torch.Tensor, K: int, core: torch.Tensor) -> torch.Tensor:
    """Each head's K best slots: s (2, H, r, n, N), core (r, r) -> i and j (2, H, n, K)"""
    return tucker_topk(widen(s), K, core)


@tucker_select.register_fake
def _(s, K, core):
    _, H, _, n, _ = s.shape
    return s.new_empty(2, H, n, K, dtype=torch.int64)


def tucker_topk(s, K, core):
    """Find the K best (i, j) of S_grid = S_row^T core S_col, in two passes. s (2, H, r, n, N)
    holds S_row and S_col -> i and j (2, H, n, K) int64

    First pass: the best rank-1 approximation, core = sigma u w^T, gives a grid of products
    a[i] b[j] with a = u^T S_row, b = w^T S_col. Its best products are in the K rows and columns
    with the largest a and b, or with the smallest. (The paper omits the smallest, products of
    two negative numbers. But u and w can also be -u and -w.) Second pass: the core scores these
    2 K * K slots. The result is exact if the core has rank 1 and K products are positive."""
    u, _, w = torch.linalg.svd(core.nan_to_num())
    vectors = torch.stack((u[:, 0], w[0]))  # (2, r)
    ab = (s * vectors.view(2, 1, -1, 1, 1)).sum(2)  # (2, H, n, N)
    largest = topk_indices(ab, K)  # (2, H, n, K)
    smallest = topk_indices(-ab, K)
    grids = torch.stack((grid_of(s, core, largest), grid_of(s, core, smallest)), dim=-3)
    best = topk_indices(grids.flatten(-3), K)  # (H, n, K), of 2 * K * K
    i, j = torch.cat((largest, smallest), dim=-1)  # (H, n, 2K)
    grid = best // K**2  # which of the two
    i = i.gather(-1, best // K)
    j = j.gather(-1, grid * K + best % K)
    return torch.stack((i, j))


def grid_of(s, core, places):
    """S_row^T core S_col at some rows and columns, places (2, H, n, K) -> (H, n, K, K)"""
    r = len(core)
    row, col = s.gather(-1, places.unsqueeze(2).expand(-1, -1, r, -1, -1))  # (H, r, n, K)
    row = (row.unsqueeze(2) * core[..., None, None]).sum(1)  # core^T row, (H, r, n, K)
    grid = 0
    for c in range(r):
        grid = grid + row[:, c].unsqueeze(-1) * col[:, c].unsqueeze(-2)
    return grid


def check_config(c):
    """Raises ValueError for options that do not fit together."""
    rank = max(1, c.mem_rank)
    parts = 2 * rank
    root = math.isqrt(c.mem_expand)
    if root * root != c.mem_expand:
        raise ValueError(f"--mem_expand={c.mem_expand}: must be a square number")
    most = c.mem_keys * root
    if c.mem_rank > 0:
        most = most // 2  # the first pass takes the best and the worst
    if c.mem_topk > most:
        raise ValueError(f"--mem_topk={c.mem_topk}: at most {most} with --mem_keys={c.mem_keys}")
    if c.mem_key_dim % parts != 0:
        raise ValueError(f"--mem_key_dim={c.mem_key_dim}: must be {parts} parts of one width")
    if c.mem_rank > 0 and c.mem_qk_norm and c.mem_key_dim < 3 * parts:
        wants = f"LayerNorm wants 3 in each of {parts} parts"  # LayerNorm leaves nothing of 1 or 2
        raise ValueError(f"--mem_key_dim={c.mem_key_dim}: {wants}")
    if c.mem_rank == 0 and c.mem_cores > 1:
        raise ValueError(f"--mem_cores={c.mem_cores}: there are none with --mem_rank=0")
    if c.mem_value_dim % c.mem_cores != 0:
        width = c.mem_value_dim
        raise ValueError(f"--mem_cores={c.mem_cores} must divide --mem_value_dim={width}")
    last = c.mem_layers[-1] + c.mem_skip
    if last >= c.n_layer:
        raise ValueError(
            f"--mem_skip={c.mem_skip}: there is no block {last}; --n_layer={c.n_layer}"
        )
