"""train.py with a change that is not worth an option: pools of their own, or another Adam for the pool.

    python bench/variants.py --variant=dense --out_dir=out/dense     the other options are those of train.py

Plain PyTorch, not fast; train.py uses nothing of this.
"""

import sys
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from memory import ValuePool

SEPARATE = {
    "separate-pools": "each memory layer has a pool of its own: a part of the rows of a larger table"
}
ADAMS = {  # what happens to the moments of rows without a gradient?
    "dense": "Adam: every row moves at every step, without a gradient by what is left of its first moment",
    "lazy": "RowAdam: moments of rows without a gradient are kept; bias correction by the global step",
    "own-steps": "lazy, with bias correction by a row's own number of steps",
    "decayed": "lazy, but both moments decay in the steps without a gradient, as in Adam",
    "square-decayed": "lazy, but the second moment decays",
    "deferred": "decayed, and the updates that Adam would have made meanwhile are added at the next gradient",
    "row-wise": "square decayed, with one second moment a row (mean over its width): 4 bytes an element less",
}


class PoolAdam(torch.optim.Optimizer):
    def __init__(self, variant, pool, lr, betas, eps=1e-15):
        super().__init__([pool.values], dict(lr=lr, betas=betas, eps=eps))
        self.variant = variant
        self.pool = pool
        pool.collect_gradients()

    @torch.no_grad()
    def step(self):
        values = self.pool.values
        group = self.param_groups[0]
        gradient = self.pool.take_gradient()
        self.update(
            values, gradient, self.state[values], group["lr"], *group["betas"], group["eps"]
        )

    def update(self, p, grad, state, lr, beta1, beta2, eps):
        if not state:
            width = 1 if self.variant == "row-wise" else p.size(1)
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": p.new_zeros(len(p), width)}
            state["steps"], state["last"] = p.new_zeros(len(p), 1), p.new_zeros(len(p), 1)
        state["step"] = step = state["step"] + 1
        rows, g = grad.indices()[0], grad.values()
        if self.variant == "dense":
            rows, g = torch.arange(len(p)), grad.to_dense()
        mean, square, last = state["mean"][rows], state["square"][rows], state["last"][rows]
        idle = step - 1 - last  # steps without a gradient
        if self.variant == "deferred":
            # Adam's updates without a gradient shrink by beta1 / sqrt(beta2) each: a geometric series.
            ratio, last = beta1 / beta2**0.5, last.clamp(min=1)
            missed = mean / (1 - beta1**last) / ((square / (1 - beta2**last)).sqrt() + eps)
            p[rows] -= lr * ratio * (1 - ratio**idle) / (1 - ratio) * missed
        if self.variant in ("decayed", "deferred"):
            mean = mean * beta1**idle
        if self.variant in ("decayed", "deferred", "square-decayed", "row-wise"):
            square = square * beta2**idle
        if self.variant == "own-steps":
            step = state["steps"][rows] + 1
        mean = beta1 * mean + (1 - beta1) * g
        g2 = g.square().mean(1, True) if self.variant == "row-wise" else g.square()
        square = beta2 * square + (1 - beta2) * g2
        state["mean"][rows], state["square"][rows] = mean, square
        state["steps"][rows] += 1
        state["last"][rows] = state["step"]
        p[rows] -= lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)


class SeparatePools(train.GPT):
    def __init__(self, config, initialize=True, group=None, replicas=None):
        super().__init__(config, initialize, group, replicas)
        layers = [self.blocks[i].ffn for i in config.mem_layers]
        S, D, dtype = self.pool.slots, config.mem_value_dim, self.pool.values.dtype
        self.pool = ValuePool(len(layers) * S, D, dtype)
        for i, layer in enumerate(layers):  # of its own rows, S from i S on
            layer.slots = self.pool.slots
            layer.retrieve = partial(self.shifted, layer.retrieve, i * S)

    def shifted(self, retrieve, offset, x):
        slots, weights = retrieve(x)
        return slots + offset, weights


def main(argv):
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--variant")
    args, argv = parser.parse_known_args(argv)
    variant, make = args.variant, train.make_optimizers
    if variant not in SEPARATE | ADAMS:
        lines = [f"  {name:15} {text}" for name, text in (SEPARATE | ADAMS).items()]
        sys.exit("\n".join(["variants.py: --variant= must be one of", *lines]))

    def make_optimizers(model, config):
        rate, betas = config.mem_learning_rate, (config.beta1, config.beta2)
        return [make(model, config)[0], PoolAdam(variant, model.pool, rate, betas)]

    if variant == "separate-pools":
        train.GPT = SeparatePools
    elif variant != "lazy":  # RowAdam is that
        train.make_optimizers = make_optimizers
    train.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
