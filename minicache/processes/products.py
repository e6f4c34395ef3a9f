"""Products of float32 numbers are computed in float32: what a script, a library or torch itself has switched on is switched off."""

import warnings
from typing import Any

import torch


def compute_in_float32() -> None:
    """Switch TF32 and bfloat16 inside of float32 products off, for matrices, convolutions and recurrent layers on any device.

    torch computes convolutions in TF32 unless it is told otherwise. It refuses to tell of a setting that its two interfaces give
    differently, so both get it. Source: pytorch.org/docs/stable/notes/cuda.html, TensorFloat-32.
    """
    with warnings.catch_warnings():
        # some versions call the older interface deprecated
        warnings.filterwarnings("ignore", "Please use the new API", UserWarning)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    whole: Any = torch.backends
    cudnn, mkldnn = whole.cudnn, whole.mkldnn
    for each in (whole, whole.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
        each.fp32_precision = "ieee"
