"""The optimizer, and learning rate and beta as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minicache.errors import ConfigError


def _adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Loshchilov & Hutter, arXiv:1711.05101; fused into one kernel a step."""
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def _bitsandbytes(name: str) -> Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]:
    """Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861."""

    def make(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(groups, lr=lr)

    return make


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw-8bit": _bitsandbytes("AdamW8bit"),
    "paged-adamw-8bit": _bitsandbytes("PagedAdamW8bit"),
}


def require_optimizer(name: str, device: torch.device) -> None:
    """Raises ConfigError: its library is not installed, or it is one for a GPU and there is none."""
    if name == "adamw":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ConfigError(f"--optimizer {name}: needs another package: pip install 'minicache[8bit]'") from None
    if name.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"--optimizer {name}: pages a GPU's memory, and there is no GPU; expected adamw-8bit or adamw"
        )


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """One of OPTIMIZERS, with betas 0.9 and 0.999. Weight decay on matrices only, not on norms and biases.

    See `require_optimizer` for what it needs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[name]([group for group in groups if group["params"]], lr)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# name -> share of the peak at a progress from 0 to 1, and a floor from 0 to 1
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    # Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5
    "cosine": lambda progress, floor: floor + (1 - floor) * _half_cosine(progress),
    "linear": lambda progress, floor: 1 - (1 - floor) * progress,
    "constant": lambda progress, floor: 1.0,
    # MiniMind's train_dpo.py: lr/10 + lr/2 (1 + cos), which begins at 1.1 lr; later lr (0.1 + 0.45 (1 + cos))
    "minimind-2504": lambda progress, floor: 0.1 + _half_cosine(progress),
    "minimind-2510": lambda progress, floor: 0.1 + _half_cosine(progress),
    "minimind-3": lambda progress, floor: 0.1 + 0.9 * _half_cosine(progress),
}
COUNTS_FROM_1 = {"minimind-2510", "minimind-3"}  # as those scripts number their steps


def learning_rate(step: int, steps: int, lr: float, schedule: str, warmup: float, floor: float) -> float:
    """Of a step (from 0): linear up over the warm-up, then by the schedule. The first step already moves.

    warmup: below 1 a share of `steps`, else a number of steps. floor: share of `lr` that cosine and linear end at.
    """
    rising = min(math.ceil(warmup * steps) if warmup < 1 else round(warmup), steps)
    if step < rising:
        return lr * (step + 1) / rising
    done = step - rising + (schedule in COUNTS_FROM_1)
    return lr * SCHEDULES[schedule](done / max(1, steps - rising), floor)


def beta_at(step: int, steps: int, beta: float, beta_end: float | None) -> float:
    """Of a step (from 0): linear from `beta` at the first to `beta_end` at the last."""
    if beta_end is None:
        return beta
    return beta + (beta_end - beta) * step / max(1, steps - 1)
