"""The cost of a step and the peak rate of the device: memory, useful FLOPs, model FLOP utilisation."""

import re
import sys
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.parameter import Parameter

from minicache.models.quantized import weight_count
from minicache.models.settings import setting
from minicache.models.whole import beside_text
from minicache.pairs import PairTable
from minicache.processes.devices import facts_of, most_memory
from minicache.scoring.batching import Indices

# Dense bfloat16 matrix rate with float32 accumulation, FLOP/s; half of the rate that NVIDIA states "with sparsity". Sources:
# NVIDIA's data sheets of B200, H100, H200, H20, A100, A30, A10, A40, L40S, L40, L4, and its architecture papers "RTX Blackwell",
# "Ada" and "Ampere GA102", appendices. SUPER, D and Ti cards without a row there: twice the float32 rate, as in all those rows.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835.5e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
    "A100": 312e12,
    "A100 PCIe": 312e12,
    "A800": 312e12,
    "A800 PCIe": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 5080": 112.6e12,
    "RTX 5070 Ti": 87.9e12,
    "RTX 5070": 61.7e12,
    "RTX 4090": 165.2e12,
    "RTX 4090 D": 147.1e12,
    "RTX 4080 SUPER": 104.4e12,
    "RTX 4080": 97.5e12,
    "RTX 4070 Ti SUPER": 88.2e12,
    "RTX 4070 Ti": 80.2e12,
    "RTX 4070 SUPER": 71e12,
    "RTX 4070": 58.3e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
}
BY_NAME = {name.casefold(): peak for name, peak in PEAKS.items()}
# Words of a device's name that do not change the rate: brand, memory, the SXM socket (the data sheets' first column).
UNIMPORTANT = re.compile(r"nvidia|geforce|\d+gb|hbm\d\w*|sxm\d*")


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of the device in half precision; None where it is not known."""
    if device.type != "cuda" or dtype == "float32":
        return None
    return peak_of(facts_of(device).name)


def peak_of(name: str) -> float | None:
    """FLOP/s of the card with exactly this name; None for others: a laptop's, a Ti or a part of a card has another rate."""
    words = re.split(r"[\s-]+", name.casefold())
    return BY_NAME.get(" ".join(word for word in words if not UNIMPORTANT.fullmatch(word)))


def memory_gb(device: torch.device) -> float:
    """Most memory taken so far, GB: of the GPU, or of the process where there is none."""
    return (most_memory(device) if device.type != "cpu" else _most_of_process()) / 1e9


def _most_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_flops(model: nn.Module, table: PairTable, indices: Indices) -> float:
    """FLOPs of forward and backward over these pairs: both sides whole, without padding and recomputation.

    A weight takes 2 FLOPs per token forward and 4 backward (2 if it is frozen); the head works on counted tokens only; causal
    attention on half of the square. Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B.
    """
    whole: Any = model
    config: Any = whole.config.get_text_config()
    lengths = table.side_lengths[indices]
    tokens, counted = float(lengths.sum()), float(table.token_counts[indices].sum())
    head, beside = whole.get_output_embeddings().weight, set(beside_text(model))
    tables = (whole.get_input_embeddings().weight, head)
    body = sum(
        _flops(parameter, config)
        for name, parameter in model.named_parameters()
        if name not in beside and not any(parameter is each for each in tables)
    )
    attention = 6.0 * _attention_widths(config) * float((lengths.astype(float) ** 2).sum())
    return body * tokens + _flops(head, config) * counted + attention


def _attention_widths(config: Any) -> float:
    """Heads times their width, summed over the layers; 0 for a family without attention (Mamba, RWKV)."""
    heads, sizes = setting(config, "num_attention_heads"), setting(config, "head_dim")
    if not heads:
        return 0.0
    sizes = sizes or config.hidden_size // heads
    layers = config.num_hidden_layers
    each = [value if isinstance(value, list) else [value] * layers for value in (heads, sizes)]
    return float(sum(count * size for count, size in zip(*each, strict=True) if count and size))


def _flops(weight: Parameter, config: object) -> float:
    """FLOPs of one weight for one token. Of stacked experts (E, rows, columns), only those that a token is routed to count."""
    if weight.ndim < 2:
        return 0.0
    experts: int = getattr(config, "num_experts_per_tok", weight.shape[0])
    used = experts / weight.shape[0] if weight.ndim == 3 else 1.0
    return weight_count(weight) * used * (6.0 if weight.requires_grad else 4.0)
