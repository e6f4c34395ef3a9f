"""The optimizer, and learning rate and beta as pure functions of the step."""

import math
from collections.abc import Callable

import torch
from torch import nn


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), fused. Weight decay on matrices only, not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=(0.9, 0.999), fused=True)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# name -> share of the peak at a progress from 0 to below 1, and a floor from 0 to 1
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    # Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5
    "cosine": lambda progress, floor: floor + (1 - floor) * _half_cosine(progress),
    "linear": lambda progress, floor: 1 - (1 - floor) * progress,
    "constant": lambda progress, floor: 1.0,
    # MiniMind's train_dpo.py: lr/10 + lr/2 (1 + cos), which begins at 1.1 lr; later lr (0.1 + 0.45 (1 + cos))
    "minimind-2504": lambda progress, floor: 0.1 + _half_cosine(progress),
    "minimind-3": lambda progress, floor: 0.1 + 0.9 * _half_cosine(progress),
}


def learning_rate(step: int, steps: int, lr: float, schedule: str, warmup: float, floor: float) -> float:
    """Of a step (from 0): linear up over the warm-up, then by the schedule. The first step already moves.

    warmup: below 1 a share of `steps`, else a number of steps. floor: share of `lr` that cosine and linear end at.
    """
    rising = min(math.ceil(warmup * steps) if warmup < 1 else round(warmup), steps)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * SCHEDULES[schedule]((step - rising) / max(1, steps - rising), floor)


def beta_at(step: int, steps: int, beta: float, beta_end: float | None) -> float:
    """Of a step (from 0): linear from `beta` at the first to `beta_end` at the last."""
    if beta_end is None:
        return beta
    return beta + (beta_end - beta) * step / max(1, steps - 1)
