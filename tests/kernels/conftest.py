"""Without a GPU the Triton kernels run in triton's interpreter, which must be chosen before triton is imported."""

import os

import torch

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter's products are tiny: threads only wait there

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
