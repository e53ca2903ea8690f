"""Mixture of experts: E SwiGLUs. A router chooses the k likeliest for each token
(arXiv:1701.06538; k = 1 is the Switch Transformer, arXiv:2101.03961). No token is dropped.

    p = softmax(W_r x)                                        router, (E,)
    y = sum over the k likeliest experts e of p[e] * expert_e(x)
                                                              k > 1: p[e] divided by their sum

    auxiliary loss = 0.01 * E * sum over e of share[e] * mean[e]

share[e] is the share of expert e in all choices. mean[e] is the mean of p[e] over tokens. E
times the sum is 1 if both are even (2101.03961, equation 4).

Letters: B batch, T time, C model width, F width of an expert, n = B * T tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels import widen
from memory import initialize_linear
from runtime.options import option


@dataclass(frozen=True)
class MoEOptions:
    moe_experts: int = option(8, "moe: experts E, each a SwiGLU", 1)
    moe_topk: int = option(1, "moe: experts that a token uses", 1)


class MoE(nn.Module):
    Options = MoEOptions
    uses_pool = False

    @classmethod
    def from_config(cls, config):
        return cls(
            dim=config.n_embd,
            hidden=config.n_ffn,
            experts=config.moe_experts,
            topk=config.moe_topk,
            initialize=False,
        )

    @staticmethod
    def check(config):
        """Raises ValueError for options that do not fit together."""
        E = config.moe_experts
        if config.moe_topk > E:
            raise ValueError(f"--moe_topk={config.moe_topk}: there are --moe_experts={E}")
        if config.n_embd % 8 != 0:
            raise ValueError(f"--n_embd={config.n_embd}: must be a multiple of 8, for experts")
        if config.n_ffn % 8 != 0:
            raise ValueError(f"--n_ffn={config.n_ffn}: must be a multiple of 8, for experts")

    def __init__(self, dim, hidden, experts, topk, initialize=True):
        super().__init__()
        self.k = topk
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        if initialize:
            self.initialize()

    def initialize(self, residual=1.0):
        _, hidden, dim = self.down.shape
        nn.init.normal_(self.gate_up, std=dim**-0.5)
        nn.init.normal_(self.down, std=residual * hidden**-0.5)
        initialize_linear(self.router)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)"""
        y, _ = self.with_loss(x)
        return y

    def with_loss(self, x):
        """x (B, T, C) -> (B, T, C), auxiliary loss"""
        shape = x.shape
        x = x.flatten(0, 1)  # (n, C)
        with torch.autocast(x.device.type, enabled=False):  # the router runs in float32
            p = F.linear(widen(x), self.router.weight).softmax(-1)  # (n, E)
        weights, experts = p.topk(self.k)  # (n, k)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        choices = F.one_hot(experts.flatten(), p.size(1))  # (n * k, E)
        y = self.run_experts(x, experts.flatten(), choices)  # (n * k, C)
        weighted = y.view(-1, self.k, y.size(1)) * weights.unsqueeze(-1)  # (n, k, C)
        y = weighted.sum(1).to(y.dtype).view(shape)
        imbalance = p.size(1) * (choices.float().mean(0) * p.mean(0)).sum()
        return y, 0.01 * imbalance

    def run_experts(self, x, experts, choices):
        """Run each choice of each token by its expert: experts (n * k,), choices (n * k, E)
        with one 1 per row -> (n * k, C)"""
        order = experts.argsort(stable=True)  # by expert
        ends = choices.sum(0).cumsum(0).int()  # (E,): end of each expert in that order
        inputs = x.repeat_interleave(self.k, 0)[order]  # (n * k, C)
        gate, up = grouped_product(inputs, self.gate_up, ends).chunk(2, dim=-1)  # (n * k, F)
        y = grouped_product(F.silu(gate) * up, self.down, ends)
        return y[order.argsort()]

    def flops(self):
        """Forward FLOPs per token: k experts and the router."""
        _, hidden, dim = self.down.shape
        return 2 * (self.k * 3 * dim * hidden + self.router.weight.numel())


def grouped_product(x, w, ends):
    """x (P, in) has rows grouped by expert up to ends (E,), w (E, in, out) -> (P, out)"""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        w = w.to(torch.get_autocast_dtype(device))
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, w, offs=ends)
    # torch.compile supports this product only in bfloat16
    return torch.compiler.disable(torch._grouped_mm)(x, w, offs=ends)
