"""What Memory+ is compared with. A system is one file here, and one line in SYSTEMS.

It is a module that takes the place of a block's feed-forward network. GPT uses of it:

    Options                 dataclass of the options that it alone has, or None
    check(config)           raises ValueError for options that do not fit together
    from_config(config)     the layer, with weights that are not yet drawn
    initialize(residual)    draws them; residual: factor of what adds to the residual stream
    flops()                 of a token, forward
    uses_pool               whether it reads a pool of values, that of make_pool(config)
    with_loss(x, pool)      x (B, T, C) -> (B, T, C), auxiliary loss (0.0: none);
                            with_loss(x) if it uses no pool

A subclass of MemoryPlus has all of these, and overrides what is different: retrieve() finds
slots and weights, read() makes one vector of a token's values, combine() is gate and output.
A system with options of its own also adds them to the bases of SystemOptions. presets.py
makes presets of a system, in each family of runs."""

from dataclasses import dataclass, fields

from systems.memory_plus import MemoryPlus
from systems.moe import MoE, MoEOptions
from systems.peer import PEER
from systems.ultramem import UltraMem, UltraMemOptions

SYSTEMS = {
    "memory": MemoryPlus,
    "moe": MoE,
    "peer": PEER,
    "ultramem": UltraMem,
}


@dataclass(frozen=True)
class SystemOptions(UltraMemOptions, MoEOptions):
    """The options that one system alone has."""


def check_system(config):
    """Raises ValueError for options of another system, or that do not fit together."""
    own = SYSTEMS[config.system].Options
    for name, system in SYSTEMS.items():
        if system.Options is None or system.Options is own:
            continue
        for f in fields(system.Options):
            value = getattr(config, f.name)
            if value != f.default:
                raise ValueError(f"{f.name}={value}: only system={name} has it")
    if config.mem_layers:
        SYSTEMS[config.system].check(config)
