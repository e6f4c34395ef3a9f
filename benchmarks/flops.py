"""Floating-point operations of a run's matrix products and attention, and how many a second the machine's own product does."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from minicache.models.quantized import weight_count
from minicache.pairs import PairTable
from minicache.scoring.batching import Indices

aten = torch.ops.aten
# Width of the square product whose rate the others are compared with.
WIDTH = 2048
Sizes = list[int]


def _of_addmm(total: Sizes, left: Sizes, right: Sizes, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _of_attention(query: Sizes, key: Sizes, value: Sizes, *_: Any, **__: Any) -> int:
    """As torch counts attention on a GPU: all pairs of a query and a key, whether they see each other or not."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (width + value[3])


def _of_its_gradient(grad: Sizes, query: Sizes, key: Sizes, value: Sizes, *_: Any, **__: Any) -> int:
    """The scores again, and the gradients of query, key, value and scores."""
    rows, heads, length, width = query
    return 2 * rows * heads * length * key[2] * (3 * width + 2 * value[3])


# What torch does not count: the forms of a CPU, and products in place.
FORMS = {
    aten.addmm_: _of_addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_its_gradient,
}


def counted(run: Callable[[], object]) -> float:
    """The operations of a run: 2 for a product of two numbers that is added."""
    with FlopCounterMode(display=False, custom_mapping=FORMS) as counter:
        run()
    return float(counter.get_total_flops())


def useful_flops(model: Any, table: PairTable, indices: Indices, training: bool) -> float:
    """FLOPs that the pairs need: each distinct token once through the decoder, the head on counted ones, attention by spans.

    A weight takes 2 per token forward and as many for the gradient of its input and, if it is trained, its own. Nothing that is
    computed twice counts twice.
    """
    config = model.config.get_text_config()
    lengths = table.lengths[indices].astype(float)  # (n, 3)
    prefix, chosen, rejected = lengths.T
    counted = float(np.add.reduceat(table.loss_mask, table.offsets[:-1], dtype=np.int64)[indices].sum())
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    body = sum(
        _per_token(each, training)
        for each in model.parameters()
        if each.ndim > 1 and not any(each is table for table in tables)
    )
    # pairs of a query and a key that it sees
    seen = sum(part * (part + 1) / 2 for part in (prefix, chosen, rejected)) + prefix * (chosen + rejected)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4 * width * config.num_hidden_layers * float(seen.sum()) * (3 if training else 1)
    flops: float = body * float(lengths.sum()) + _per_token(tables[1], training) * counted + attention
    return flops


def _per_token(weight: Any, training: bool) -> float:
    factor = 2 if not training else 6 if weight.requires_grad else 4
    return float(factor * weight_count(weight))


class Product:
    """A product of two square matrices in the precision and on the device of a case."""

    def __init__(self, device: torch.device, dtype: str) -> None:
        numbers = torch.rand(2, WIDTH, WIDTH, device=device).to(getattr(torch, dtype))
        self.left, self.right = numbers
        self.times = 3

    def run(self) -> None:
        """Compute it, `times` times."""
        for _ in range(self.times):
            torch.mm(self.left, self.right)

    def share(self, flops: float, seconds: list[float], of_product: list[float]) -> float:
        """The rate of `flops` a run over the product's, the median of the rounds. seconds, of_product: of each round."""
        mine = 2 * WIDTH**3 * self.times
        return statistics.median(
            flops / ours / (mine / product) for ours, product in zip(seconds, of_product, strict=True)
        )
