"""A pool of values that several processes share. Each holds a part of the columns
(Memory Layers at Scale, arXiv:2412.09764, section 3).

Letters as in memory.py; M ranks share a table."""

import torch
import torch.distributed as dist

from kernels import collecting_lookup
from memory import ValuePool


class ShardedPool(ValuePool):
    """A ValuePool with all S rows but only D/M of their columns. All ranks of the group must call
    it together, with the same number of tokens.

    group     the M ranks that share the table
    replicas  the ranks that hold the same columns in other groups, or None

    For n tokens of k slots, at e bytes per number, a rank sends (M - 1) n (8 k + e D / M) bytes
    forward and (M - 1) n (e D / M + 4 k) bytes backward. Neither depends on S."""

    def __init__(self, slots, dim, dtype, group, replicas=None, initialize=True):
        M = group.size()
        rank = group.rank()
        if dim % M != 0:
            raise ValueError(f"{M} processes cannot share values of width {dim}")
        super().__init__(slots, dim // M, dtype, initialize=False)
        self.dim = dim
        self.group = group
        self.replicas = replicas
        self.M = M
        self.columns = slice(rank * dim // M, (rank + 1) * dim // M)
        if initialize:
            self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw the same numbers as in one table."""
        for rows in self.values.split(4096):
            whole = torch.empty(len(rows), self.dim, device=rows.device).normal_(std=0.02)
            rows.copy_(whole[:, self.columns])

    def lookup(self, rows, weights):
        # torch.compile does not trace all-to-all with gradients
        return torch.compiler.disable(self.sharded_lookup)(rows, weights)

    def sharded_lookup(self, rows, weights):
        """Each rank sends its tokens' slots and weights to all ranks, and looks up its columns for
        all tokens. An all-to-all returns each token's columns to its rank: (n, D)."""
        rows = self.send_to_all(rows.int())  # (M * n, H*K)
        weights = self.send_to_all(weights)
        y = collecting_lookup(self.values, rows, weights, self.gradient, self.touched)
        y = y.unflatten(0, (self.M, -1))  # (M, n, D/M)
        y = Exchange.apply(y, self.group)
        return y.transpose(0, 1).flatten(1)

    def send_to_all(self, x):
        """x (n, ...) of this rank's tokens -> (M * n, ...) of all ranks'."""
        copies = x.expand(self.M, *x.shape)
        return Exchange.apply(copies, self.group).flatten(0, 1)

    def reduce(self, x, operation):
        """Combine x over replicas. In this group, the gradients of columns are already complete."""
        if self.replicas is not None:
            dist.all_reduce(x, operation, group=self.replicas)


class Exchange(torch.autograd.Function):
    """All-to-all: x (M, ...) -> (M, ...). Block j goes to rank j of the group. Block i of the
    result comes from rank i. The same exchange returns the gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.group), None


def whole_table(pool, part):
    """part (S, D/M), this rank's columns of values or moments -> all columns (S, D) on the CPU of
    rank 0, None on other ranks. If the pool is not sharded, return part."""
    if not isinstance(pool, ShardedPool):
        return part
    table = None
    if dist.get_rank() == 0:
        table = torch.empty(len(part), pool.dim, dtype=part.dtype)
    for start in range(0, len(part), 2**16):  # pieces leave room for all else on a GPU
        piece = part[start : start + 2**16].contiguous()
        pieces = [torch.empty_like(piece) for _ in range(pool.M)]
        dist.all_gather(pieces, piece, group=pool.group)
        if table is not None:
            table[start : start + 2**16] = torch.cat(pieces, dim=1)
    return table


def own_columns(pool, table):
    """The inverse of whole_table: all columns (S, D) -> those that this process holds."""
    if not isinstance(pool, ShardedPool):
        return table
    return table[:, pool.columns]
