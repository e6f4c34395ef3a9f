"""The optimizers that options/catalog.py names."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from minicache.errors import ConfigError
from minicache.options.catalog import OPTIMIZERS, code_of

Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Loshchilov & Hutter, arXiv:1711.05101; one fused kernel per step."""
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def adamw_8bit(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=lr)


def paged_adamw_8bit(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """`adamw_8bit` with its state in memory that CUDA moves to the CPU and back."""
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(groups, lr=lr)


def require_optimizer(name: str, device: torch.device) -> None:
    """Raises ConfigError: its library is not installed, or it is one for a GPU and there is none."""
    entry = OPTIMIZERS[name]
    if entry.package and find_spec(entry.package) is None:
        raise ConfigError(f"--optimizer {name}: needs another package: pip install 'minidpo[{entry.extra}]'")
    if entry.gpu_only and device.type != "cuda":
        others = " or ".join(each for each, one in OPTIMIZERS.items() if not one.gpu_only)
        raise ConfigError(f"--optimizer {name}: pages a GPU's memory, and there is no GPU; expected {others}")


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """One of OPTIMIZERS, with betas 0.9 and 0.999. Weight decay on matrices only, not on norms and biases.

    See `require_optimizer` for what it needs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return code_of(OPTIMIZERS[name])([group for group in groups if group["params"]], lr)
