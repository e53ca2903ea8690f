"""train.py with another Adam for the pool, to compare with RowAdam: what happens to a row's moments while no step reads it?

    python bench/optimizers.py --variant=dense --out_dir=out/dense     the other options are those of train.py
    python bench/compare.py --only="pool optimisers"                   all of them, with their seeds

In plain PyTorch and as slow as that is; nothing here is used by train.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train

VARIANTS = {
    "dense": "Adam: every row moves at every step, those without a gradient by what is left of their mean",
    "lazy": "RowAdam: moments stand still while a row sleeps, and one count of steps corrects the bias of all rows",
    "own steps": "lazy, but each row counts its own steps for the correction of the bias",
    "decayed": "lazy, but on waking both moments have decayed as they would have in Adam",
    "square decayed": "lazy, but the second moment has",
    "deferred": "decayed, and what Adam would have moved the row by meanwhile is added when it wakes",
    "row-wise": "square decayed, and one second moment a row, the mean over its width: 4 bytes of state less an element",
}


class PoolAdam(torch.optim.Optimizer):
    def __init__(self, variant, params, lr, betas, eps=1e-15):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.variant = variant

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad.coalesce(), self.state[p], group["lr"], *group["betas"], group["eps"])

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
        slept = step - 1 - last
        if self.variant == "deferred":
            # Adam's steps without a gradient shrink by beta1 / sqrt(beta2) each: a geometric series.
            ratio, last = beta1 / beta2**0.5, last.clamp(min=1)
            missed = mean / (1 - beta1**last) / ((square / (1 - beta2**last)).sqrt() + eps)
            p[rows] -= lr * ratio * (1 - ratio**slept) / (1 - ratio) * missed
        if self.variant in ("decayed", "deferred"):
            mean = mean * beta1**slept
        if self.variant in ("decayed", "deferred", "square decayed", "row-wise"):
            square = square * beta2**slept
        if self.variant == "own steps":
            step = state["steps"][rows] + 1
        mean = beta1 * mean + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * (g.square().mean(1, True) if self.variant == "row-wise" else g.square())
        state["mean"][rows], state["square"][rows] = mean, square
        state["steps"][rows] += 1
        state["last"][rows] = state["step"]
        p[rows] -= lr * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)


def main(argv):
    variant = next((a.removeprefix("--variant=") for a in argv if a.startswith("--variant=")), None)
    if variant not in VARIANTS:
        sys.exit("optimizers.py: --variant= must be one of\n" + "\n".join(f"  {name:15} {text}" for name, text in VARIANTS.items()))
    make = train.make_optimizers

    def make_optimizers(model, config):
        betas = (config.beta1, config.beta2)
        return [make(model, config)[0], PoolAdam(variant, [model.pool.values], config.mem_learning_rate, betas)]

    if variant != "lazy":  # RowAdam is that
        train.make_optimizers = make_optimizers
    train.main([a for a in argv if not a.startswith("--variant=")])


if __name__ == "__main__":
    main(sys.argv[1:])
