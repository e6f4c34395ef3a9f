"""The optimizer, and the learning rate as a pure function of the step."""

import math

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


def cosine_with_warmup(step: int, steps: int, lr: float, warmup: float) -> float:
    """Learning rate of a step (from 0): linear up over the first `warmup` share of `steps`, then half a cosine to 0.

    The first step already moves, and the last one still does. Source: Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return lr * (step + 1) / rising
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
