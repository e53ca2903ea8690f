"""Memory+ in a GPT: the MemoryLayer of memory.py, made from the options of a GPTConfig. With
mem_gate=False and mem_qk_norm=False it is the product-key memory of 2019.

Other systems that read a pool of values are subclasses. They override what is different."""

import torch

from memory import MemoryLayer, ValuePool


class MemoryPlus(MemoryLayer):
    Options = None  # GPTConfig has all options of a memory
    uses_pool = True

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
        return ValuePool(
            slots=config.mem_keys**2,
            dim=config.mem_value_dim,
            dtype=getattr(torch, config.mem_dtype),
            initialize=False,
        )

    @staticmethod
    def check(config):
        """Raises ValueError for options that do not fit together."""
        if config.mem_topk > config.mem_keys:
            most = f"at most {config.mem_keys} with mem_keys={config.mem_keys}"
            raise ValueError(f"mem_topk={config.mem_topk}: {most}")
        if config.mem_key_dim % 2 != 0:
            raise ValueError(f"mem_key_dim={config.mem_key_dim}: must be even, it has two halves")

    def with_loss(self, x, pool):
        """x (B, T, C) -> (B, T, C), and no auxiliary loss"""
        return self(x, pool), 0.0
