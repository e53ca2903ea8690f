"""Train as train.py does, but let Adam move all rows of the tables in every step, as
torch.optim.Adam would. RowAdam moves only the rows that a step has read.

    python bench/all_rows.py --preset=facts-engram      and all other options of train.py

Checkpoints do not record this: resume with this program, not with train.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from kernels import RowAdam
from runtime.files import ignore_stream_errors


class AllRowsAdam(RowAdam):
    def update(self, values, rows, grads, state, options):
        dense = torch.zeros_like(values)
        dense[rows] = grads
        every = torch.arange(len(values), device=values.device)
        super().update(values, every, dense, state, options)


if __name__ == "__main__":
    train.RowAdam = AllRowsAdam  # make_optimizers takes it
    ignore_stream_errors()
    train.main(sys.argv[1:])
