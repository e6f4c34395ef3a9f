"""f-divergences: the functions f' that replace the log ratio in a loss. options/catalog.py names them.

Source: Wang et al. 2023, Beyond Reverse KL, arXiv:2309.16240, table 1. Each takes log ratios of any shape and returns f' of them.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import softplus

from minicache.options.catalog import DIVERGENCES, code_of

Divergence = Callable[[torch.Tensor, float], torch.Tensor]


def divergence_named(name: str) -> Divergence:
    """The function of a divergence in DIVERGENCES."""
    divergence: Divergence = code_of(DIVERGENCES[name])
    return divergence


def reverse_kl(ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """f'(t) = log t + 1; constants cancel."""
    return ratios


def forward_kl(ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """f'(t) = 1 - 1/t."""
    return -torch.expm1(-ratios)


def jensen_shannon(ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """f'(t) = log(2t / (1 + t))."""
    return math.log(2) - softplus(-ratios)


def alpha_divergence(ratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """f'(t) = (t^(alpha-1) - 1) / (alpha - 1), in TRL's sign and with its guard against overflow; log t at alpha = 1."""
    if abs(alpha - 1) < 1e-6:
        return ratios
    return torch.expm1((ratios * (alpha - 1)).clamp(max=80.0)) / (alpha - 1)
