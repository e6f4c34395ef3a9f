"""What checks find, and what they are given. No torch before it is needed."""

import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from minicache.text import one_line

if TYPE_CHECKING:
    import torch

    from minicache.processes.world import World

Value = bool | float | str | None


class NeedsGpu(Exception):
    """From here on a check needs a GPU, or something else that is not here; the message says which."""


@dataclass(frozen=True)
class Figure:
    """A number, fact or text. expected: as text; holds: whether it is as expected, None where nothing is expected.

    error: what was raised in its place.
    """

    name: str
    value: Value
    unit: str = ""
    expected: str = ""
    holds: bool | None = None
    error: str = ""


def at_most(name: str, value: float, bound: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f"at most {bound:g}", value <= bound)


def at_least(name: str, value: float, bound: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f"at least {bound:g}", value >= bound)


def exactly(name: str, value: Value, expected: Value) -> Figure:
    return Figure(name, value, "", str(expected), value == expected)


def within(name: str, value: float, share: float) -> Figure:
    """A ratio that should be 1."""
    return Figure(name, value, "", f"1 ± {share:g}", abs(value - 1) <= share)


def near_ln_2(name: str, loss: float) -> Figure:
    """How far a loss at step 0 is from ln 2."""
    return at_most(f"{name}: |loss at step 0 - ln 2|", abs(loss - math.log(2)), 1e-3)


def attempt(name: str, figures: Callable[[], Iterable[Figure]]) -> Iterator[Figure]:
    """The figures of a part of a check. If it raises, that is a figure with the error, and the memory it held is given back."""
    line = ""
    try:
        yield from figures()
    except NeedsGpu:
        raise
    # kernels and compilers fail in many ways
    except Exception as error:
        line = one_line(error, 300)
    # the error is gone, and with it the tensors it referred to
    release()
    if line:
        yield Figure(name, None, error=line)


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_graphs() -> None:
    """Let torch compile anew: it compiles a function for a few kinds of inputs, and then runs it without compiling, and slowly."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@dataclass(frozen=True)
class Machine:
    """Where checks run. tiny: with shapes for a CPU, on a CPU."""

    tiny: bool

    @cached_property
    def device(self) -> "torch.device":
        """The device, set up as the command line does."""
        return self.world.device

    @cached_property
    def world(self) -> "World":
        from minicache.models.huggingface import quiet
        from minicache.processes.world import join_world

        quiet()
        return join_world("cpu" if self.tiny else "auto")

    @property
    def has_cuda(self) -> bool:
        return self.device.type == "cuda"

    def needs_gpu(self, what: str) -> None:
        """Raises NeedsGpu: this is no GPU."""
        if not self.has_cuda:
            raise NeedsGpu(f"needs a GPU: {what}")
