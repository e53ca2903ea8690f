"""PEER: a million experts of one neuron (He 2024, arXiv:2407.04153).

Slots are retrieved as in Memory+, but slot s holds a neuron of two vectors, u_s and v_s:

    y = sum over heads and their slots of p[s] * gelu(u_s . x) * v_s

u_s and v_s are rows s and S + s of the pool. Letters as in memory.py."""

import torch
import torch.nn.functional as F

from kernels import (
    check_accumulator,
    check_collector,
    check_inputs,
    collects,
    lookup_backward_into,
    lookup_forward,
    products,
)
from memory import ValuePool
from systems.memory_plus import MemoryPlus


class PEER(MemoryPlus):
    Options = None

    @staticmethod
    def make_pool(config):
        return NeuronPool(
            slots=config.mem_keys**2,
            dim=config.n_embd,
            dtype=getattr(torch, config.mem_dtype),
            tables=2,
            initialize=False,
        )

    @staticmethod
    def check(config):
        MemoryPlus.check(config)
        width = config.mem_value_dim
        if width != config.n_embd:
            raise ValueError(f"--mem_value_dim={width}: peer wants --n_embd={config.n_embd}")

    def read(self, x, pool):
        """x (n, C) -> (n, C)"""
        slots, weights = self.retrieve(x)  # (n, H*K)
        z = dot(pool, slots, x)  # u_s . x, (n, H*K)
        return pool(pool.slots + slots, weights * F.gelu(z))

    def flops(self):
        """Each slot has two rows to read."""
        return super().flops() + 2 * self.H * self.K * self.D


class NeuronPool(ValuePool):
    """Two tables of S rows: u, and below it v."""

    @torch.no_grad()
    def initialize(self):
        super().initialize()
        self.values[: self.slots] *= 50 * self.dim**-0.5  # from 0.02, so u . x has spread 1


def dot(pool, rows, x):
    """rows (n, k), x (n, C) -> values[rows[i, j]] . x[i], (n, k), float32 or wider."""
    check_inputs(pool.values, rows, x)
    if x.shape != (len(rows), pool.values.size(1)):
        raise ValueError(f"x {tuple(x.shape)}: must be (n, {pool.values.size(1)})")
    check_accumulator(pool.values, pool.gradient, pool.touched)
    return Dot.apply(pool.values, rows.contiguous(), x.contiguous(), pool.gradient, pool.touched)


class Dot(torch.autograd.Function):
    """z[i, j] = values[rows[i, j]] . x[i] is the gradient of the weights in a lookup with
    dY = x. So the kernels of the lookup compute z and its gradients:

        dx[i] = sum over j of dz[i, j] * values[rows[i, j]]     a lookup with weights dz
        dvalues                                                 its gradient, for dY = x
    """

    @staticmethod
    def forward(ctx, values, rows, x, gradient, touched):
        ctx.save_for_backward(values, rows, x)
        ctx.gradient = gradient
        ctx.touched = touched
        return products(values, rows, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        values, rows, x = ctx.saved_tensors
        grad = grad.contiguous()
        if collects(ctx, values):
            check_collector(ctx.gradient)
            lookup_backward_into(values, rows, grad, x, ctx.gradient, ctx.touched)
        grad_x = lookup_forward(values, rows, grad).to(x.dtype)
        return None, None, grad_x, None, None
