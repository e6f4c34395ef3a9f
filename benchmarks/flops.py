"""Floating-point operations of a run's matrix products and attention, and how many a second the machine's own product does."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

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
