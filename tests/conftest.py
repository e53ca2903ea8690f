"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before Triton is imported."""

import os

import torch

os.environ["NANOMEM_DEBUG"] = "1"  # slots out of range are errors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(2)  # the same sums in the same order, on any machine
