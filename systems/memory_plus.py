"""Memory+ in a GPT: the MemoryLayer of memory.py, made from the options of a GPTConfig. With
mem_gate=False and mem_qk_norm=False it is the product-key memory of 2019.

Other systems that read a pool of values are subclasses. They override what is different."""

from dataclasses import dataclass

import torch

from memory import MemoryLayer, ValuePool
from runtime.options import option


@dataclass(frozen=True)
class MemoryOptions:
    mem_shared: bool = option(True, "memory: layers share all slots; false: each has its own")


class MemoryPlus(MemoryLayer):
    Options = MemoryOptions
    uses_pool = True
    first_row = 0  # of this layer's values in the pool. GPT sets it where layers do not share

    @classmethod
    def from_config(cls, config):
        return cls(
            dim=config.n_embd,
            slots=config.mem_keys**2,
            heads=config.mem_heads,
            topk=config.mem_topk,
            key_dim=config.mem_key_dim,
            value_dim=config.mem_value_dim,
            gate=config.mem_gate,
            qk_norm=config.mem_qk_norm,
            initialize=False,
        )

    @staticmethod
    def make_pool(config):
        tables = 1
        if not config.mem_shared:
            tables = len(config.mem_layers)
        return ValuePool(
            slots=config.mem_keys**2,
            dim=config.mem_value_dim,
            dtype=getattr(torch, config.mem_dtype),
            tables=tables,
            initialize=False,
        )

    @staticmethod
    def check(config):
        """Raises ValueError for options that do not fit together."""
        if config.mem_topk > config.mem_keys:
            most = f"at most {config.mem_keys} with --mem_keys={config.mem_keys}"
            raise ValueError(f"--mem_topk={config.mem_topk}: {most}")
        if config.mem_key_dim % 2 != 0:
            raise ValueError(f"--mem_key_dim={config.mem_key_dim}: must be even, it has two halves")

    def read(self, x, pool):
        """x (n, C) -> (n, D)"""
        slots, weights = self.retrieve(x)
        return pool(self.first_row + slots, weights)

    def with_loss(self, x, pool):
        """x (B, T, C) -> (B, T, C), and no auxiliary loss"""
        return self(x, pool), 0.0
