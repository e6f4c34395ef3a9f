"""The optimizers that options/catalog.py names."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from minicache.errors import ConfigError
from minicache.options.catalog import OPTIMIZERS, code_of

Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """AdamW in one fused kernel per step. Source: Loshchilov & Hutter, arXiv:1711.05101."""
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def adamw_8bit(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """AdamW with its state in 8 bits. Source: Dettmers et al. 2022, 8-bit Optimizers, arXiv:2110.02861."""
    return _from_bitsandbytes("AdamW8bit", groups, lr)


def paged_adamw_8bit(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """`adamw_8bit` with its state in memory that CUDA moves to the CPU and back."""
    return _from_bitsandbytes("PagedAdamW8bit", groups, lr)


def _from_bitsandbytes(name: str, groups: Groups, lr: float) -> torch.optim.Optimizer:
    # By name: the library is untyped, and not installed everywhere.
    made: torch.optim.Optimizer = getattr(import_module("bitsandbytes.optim"), name)(groups, lr=lr)
    return made


def require_optimizer(name: str, device: torch.device) -> None:
    """Raises ConfigError: the optimizer's library is not installed, or has nothing for this kind of device."""
    entry = OPTIMIZERS[name]
    if entry.package and find_spec(entry.package) is None:
        raise ConfigError(f"--optimizer {name}: needs another package: pip install 'minidpo[{entry.extra}]'")
    if entry.package == "bitsandbytes" and device.type not in ("cpu", "cuda", "xpu"):
        raise ConfigError(f"--optimizer {name}: bitsandbytes has none for {device.type}; expected adamw")
    if entry.gpu_only and device.type != "cuda":
        others = " or ".join(each for each, one in OPTIMIZERS.items() if not one.gpu_only)
        raise ConfigError(f"--optimizer {name}: pages a GPU's memory, and there is no GPU; expected {others}")


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of this name for the trainable parameters, with betas 0.9 and 0.999.

    Weight decay acts on matrices only, not on norms and biases. `require_optimizer` checks what the optimizer needs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    made: torch.optim.Optimizer = code_of(OPTIMIZERS[name])([group for group in groups if group["params"]], lr)
    return made
