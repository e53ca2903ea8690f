"""Systems to compare with Memory+. A system is one file here, and one line in SYSTEMS.

A system is a module that replaces a block's feed-forward network. GPT uses these members:

    Options                 dataclass of the options that only this system has, or None
    check(config)           raises ValueError for options that do not fit together
    from_config(config)     makes the layer, without drawing its weights
    initialize(residual)    draws the weights; residual scales those that add to the residual
                            stream
    flops()                 forward FLOPs per token
    uses_pool               True if it reads the pool of values from make_pool(config)
    with_loss(x, pool)      x (B, T, C) -> (B, T, C), auxiliary loss (0.0 if none);
                            with_loss(x) if it uses no pool

A subclass of MemoryPlus has all of these, and overrides what is different: retrieve() finds
slots and weights, read() turns a token's values into one vector, combine() applies gate and
output matrix. A system with its own options also adds them to the bases of SystemOptions.
presets.py has presets of each system, in each family of runs.

N-gram memories (engram.py) replace nothing: they add to the input of a block, beside any system."""

from dataclasses import dataclass, fields

from systems.engram import NgramOptions, check_ngrams
from systems.memory_plus import MemoryOptions, MemoryPlus
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
class SystemOptions(NgramOptions, UltraMemOptions, MoEOptions, MemoryOptions):
    """The options that only one system has, and those of n-gram memories."""


def check_system(config):
    """Raises ValueError for options of another system, or if options do not fit together."""
    own = SYSTEMS[config.system].Options
    for name, system in SYSTEMS.items():
        if system.Options is None or system.Options is own:
            continue
        for f in fields(system.Options):
            value = getattr(config, f.name)
            if value != f.default:
                raise ValueError(f"--{f.name}={value}: only --system={name} has it")
    if config.mem_layers:
        SYSTEMS[config.system].check(config)
    if config.ngram_layers:
        check_ngrams(config)
