"""The memory that the passes of a model take, counted on tensors without content: the model's own code runs on their shapes.

A pass is run on one pair and on two, so what it takes is known for any number of pairs. Nothing is a formula of a family's own:
what autograd keeps, autocast's copies of weights, the head's chunks and recomputed layers are tensors, and they are counted.
"""

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from minicache.models.layers import layers_of
from minicache.models.quantized import quantized_layers, stand_in
from minicache.scoring.attention import Spans
from minicache.scoring.batch import Batch
from minicache.scoring.scorer import Scorer

log = logging.getLogger(__name__)


class Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still live, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Spans):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def know(self, module: nn.Module) -> None:
        """Count the module's own tensors and gradients as there already, not as made within this."""
        for tensor in [*module.parameters(), *module.buffers()]:
            for each in (tensor, tensor.grad):
                if each is not None:
                    self._sizes[each.untyped_storage()._cdata] = 0

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@dataclass(frozen=True)
class Pass:
    """Bytes that a pass takes beside weights and gradients: fixed + pairs x (bytes of a pair). slots: token slots of a pair."""

    fixed: float
    pair: float
    slots: int

    @property
    def slot(self) -> float:
        """Bytes per token slot."""
        return self.pair / self.slots


def bytes_of(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of tensors, a storage that several of them share counted once."""
    return sum({id(each): each.numel() * each.element_size() for each in tensors}.values())


def counted_pass(scorer: Scorer, one: Batch, two: Batch, training: bool) -> Pass:
    """What the passes over a batch take, counted on tensors without content. scorer: its tensors may be on any device.

    one, two: a batch of one pair and of two such pairs, on the CPU. training: with backward; else without gradients.

    Raises:
        Exception: of any kind, where the model's code reads the values of tensors.
    """
    stack = _stack(scorer.model)
    first, period = _periods(scorer.model, stack)
    counts = (first + period, first + 2 * period) if stack and first + 2 * period < len(stack) else (0,)
    found = [[_peak(scorer, batch, training, keep) for batch in (one, two)] for keep in counts]
    if stack and len(counts) > 1:
        more = (len(stack) - counts[0]) / period
        found.append([less + (most - less) * more for less, most in zip(*found, strict=True)])
    small, large = found[-1]
    return Pass(fixed=max(0.0, 2 * small - large), pair=large - small, slots=two.input_ids.numel() // 2)


def run_pass(scorer: Scorer, one: Batch, two: Batch, training: bool) -> Pass:
    """As `counted_pass`, with the model as it is: the passes really run."""
    peaks = []
    for batch in (one, two):
        with Counter() as counter:
            counter.know(scorer)
            _passes(scorer, batch, training)
        peaks.append(counter.peak)
        scorer.zero_grad(set_to_none=True)
    return Pass(max(0, 2 * peaks[0] - peaks[1]), peaks[1] - peaks[0], two.input_ids.numel() // 2)


def _peak(scorer: Scorer, batch: Batch, training: bool, keep: int) -> int:
    """The most bytes at once, beside weights and gradients. keep: number of decoder layers; 0: all."""
    inputs = scorer._inputs(batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = _without_content(scorer, mode, keep)
    with mode:
        fake = replace(
            batch,
            mask=None,
            **{
                item.name: _empty(getattr(batch, item.name))
                for item in fields(batch)
                if item.name != "mask" and isinstance(getattr(batch, item.name), torch.Tensor)
            },
        )
        given = tree_map_only(torch.Tensor, lambda each: each if isinstance(each, Spans) else _empty(each), inputs)
        made._inputs = lambda batch: given  # type: ignore[method-assign]
        for parameter in made.parameters():
            if training and parameter.requires_grad:
                parameter.grad = _empty(parameter)
        with Counter() as counter:
            counter.know(made)
            _passes(made, fake, training)
    return counter.peak


def _passes(scorer: Scorer, batch: Batch, training: bool) -> None:
    with nullcontext() if training else torch.no_grad():
        scores = scorer(batch, distribution=True)
    if training:
        total = scores.logp_sum.sum() + (0 if scores.balance is None else scores.balance.sum())
        total.backward()


def _without_content(scorer: Scorer, mode: FakeTensorMode, keep: int) -> Scorer:
    """A copy whose tensors have shapes alone, on the CPU. keep: number of decoder layers; 0: all."""
    memo: dict[int, Any] = {}
    with mode:
        for parameter in scorer.parameters():
            memo[id(parameter)] = nn.Parameter(_empty(parameter), requires_grad=parameter.requires_grad)
        for buffer in scorer.buffers():
            memo[id(buffer)] = _empty(buffer)
    made = copy.deepcopy(scorer, memo)
    for layer in quantized_layers(made.model):
        stand_in(layer)
    for module in made.modules():
        # what such a rule looks at is the content of positions
        if getattr(module, "rope_type", None) is not None:
            module.rope_type = "default"
    if keep:
        stack = _stack(made.model)
        assert stack is not None
        del stack[keep:]
    return made


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _stack(model: nn.Module) -> nn.ModuleList | None:
    """The list of all decoder layers of a model; None if they are in several, or not marked."""
    layers = set(layers_of(model))
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and layers & set(each)]
    return lists[0] if len(lists) == 1 and set(lists[0]) == layers else None


def _periods(model: Any, stack: nn.ModuleList | None) -> tuple[int, int]:
    """The number of layers before those that repeat, and after how many they repeat."""
    if stack is None:
        return 0, 0
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(stack)
    signs = [
        (type(layer), kind, tuple((name, each.shape, each.dtype) for name, each in layer.named_parameters()))
        for layer, kind in zip(stack, kinds, strict=False)
    ]
    for first in range(4):
        for period in range(1, 9):
            if signs[first:-period] == signs[first + period :]:
                return first, period
    return 0, len(stack)
