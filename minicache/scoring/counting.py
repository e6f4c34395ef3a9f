"""The memory that the passes of a model take, counted on tensors without content: the model's own code runs on their shapes.

A pass runs on one pair and on two, with few decoder layers and with some more; from that it is known for any number of pairs and
for all layers. No family has a formula of its own: what autograd keeps, autocast's copies of weights, the head's chunks and the
layers computed again are tensors, and they are counted.
"""

import copy
import logging
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from minicache.loggers import hushed
from minicache.models import checkpoint_activations, layers_of
from minicache.models.layers import repeats_of, stack_of
from minicache.models.quantized import quantized_layers, stand_in
from minicache.processes.devices import as_if_on, attention_kernels
from minicache.scoring.batch import Batch
from minicache.scoring.counter import Counter
from minicache.scoring.kernels import Spans, as_if_fused
from minicache.scoring.memory import How, Line, Pass
from minicache.scoring.probe import own_errors
from minicache.scoring.scorer import DTYPES, Scorer


def counted_pass(scorer: Scorer, one: Batch, two: Batch, how: How) -> Pass:
    """The memory of a pass, counted on tensors without content. The scorer's own tensors are not touched.

    one, two: a batch of a pair, and one of two such pairs, on the CPU.

    Raises:
        ModelError: the model's code looks at the values of tensors, which are not there.
    """
    stack = stack_of(scorer.model)
    first, period = repeats_of(scorer.model, stack)
    counts = [0]
    # the layer after those has one more tensor beside it, its input, than the first layer of all
    start = first + 1
    if stack and start + 2 * period < len(stack):
        counts = [start + period, start + 2 * period]
    # torch logs as an error that a shape could not be found: another way is taken then
    quiet = hushed("torch._subclasses.fake_tensor", logging.CRITICAL)
    # where it walks there too, or the mask is dense, soft caps and sinks make scores
    fused = as_if_fused() if is_fused(scorer, how.kind) else nullcontext()
    with quiet, as_if_on(how.kind), fused:
        # (layers, batches, 3)
        found = torch.tensor([[_peaks(scorer, batch, how, keep) for batch in (one, two)] for keep in counts]).double()
        head, kept, rows = _head(scorer, how)
        of_embedding = _of_embedding(scorer, how)
    peaks = found[-1]
    if stack and len(counts) > 1:
        peaks = found[1] + (found[1] - found[0]) * (len(stack) - counts[1]) / period
    forward, at_head, backward = (Line.through(*each) for each in peaks.T.tolist())
    return Pass(
        forward=forward,
        at_head=at_head,
        backward=backward,
        slots=one.input_ids.numel(),
        head=head,
        kept=kept,
        of_pair=head * len(one.sources) / rows,
        end=kept + of_embedding,
    )


def run_pass(scorer: Scorer, one: Batch, two: Batch, how: How) -> Pass:
    """As `counted_pass`, of passes that really run. one, two: on the scorer's device."""
    peaks = []
    layers = layers_of(scorer.model) if how.training and how.checkpointing else []
    if layers:
        checkpoint_activations(scorer.model)
    try:
        for batch in (one, two):
            for parameter in scorer.parameters():
                if how.training and parameter.requires_grad:
                    # as between micro-batches; made by a short pass they would be most of its memory
                    parameter.grad = torch.zeros_like(parameter)
            with Counter() as counter:
                counter.know(scorer)
                _passes(scorer, batch, how.training)
            peaks.append(counter.peak)
            scorer.zero_grad(set_to_none=True)
    finally:
        scorer.zero_grad(set_to_none=True)
        for layer in layers:
            del layer.forward
    line = Line.through(*peaks)
    return Pass(line, line, line, one.input_ids.numel())


def is_fused(scorer: Scorer, kind: str) -> bool:
    """Whether a kernel of packed rows scores on this kind of device, for which a walk over spans stands; none makes scores."""
    return not scorer.layout.pads and (scorer.kernel or attention_kernels(torch.device(kind))[-1]) != "spans"


def _peaks(scorer: Scorer, batch: Batch, how: How, keep: int) -> tuple[int, int, int]:
    """The most bytes before the head runs, those that are there while it does, and the most after it.

    Each grows in its own way, and the largest of short passes may be another one than that of long ones. A head that is not ours
    does not part them. keep: number of decoder layers; 0: all.
    """
    inputs = scorer.inputs_of(batch, kernel="spans")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = _without_content(scorer, mode, how, keep)
    tensors = {item.name: getattr(batch, item.name) for item in fields(batch)}
    with mode:
        empty: dict[str, Any] = {name: _empty(each) for name, each in tensors.items() if isinstance(each, torch.Tensor)}
        # walking over spans reads them
        given = tree_map_only(torch.Tensor, lambda each: each if isinstance(each, Spans) else _empty(each), inputs)
        made.inputs_of = lambda *_: given  # type: ignore[method-assign]
        for parameter in made.parameters():
            if how.training and parameter.requires_grad:
                parameter.grad = _empty(parameter)
        with Counter() as counter:
            counter.know(made)
            if made.head:
                aside = _HeadAside(counter)
                made.head = aside  # type: ignore[assignment]
            _passes(made, replace(batch, **empty), how.training)
    if not made.head:
        return counter.peak, counter.peak, counter.peak
    return aside.before or counter.peak, aside.live, counter.peak if aside.before else 0


def _head(scorer: Scorer, how: How) -> tuple[int, int, int]:
    """The bytes that the head makes, those that stay until the end, and the number of predictions from which it is so many."""
    if scorer.head is None:
        return 0, 0, 1
    weight = scorer.head.linear.weight
    kept = how.training and weight.requires_grad and weight is scorer.model.get_input_embeddings().weight
    size = scorer.head.bytes(how.kind, DTYPES[scorer.dtype], how.training)
    return size, weight.numel() * weight.element_size() if kept else 0, scorer.head.rows(how.kind)


def _of_embedding(scorer: Scorer, how: How) -> int:
    """The bytes of the embedding's gradient, which `_without_content` leaves out."""
    weight = scorer.model.get_input_embeddings().weight
    if not (how.training and weight.requires_grad and scorer.head):
        return 0
    # of one in half precision, summed in float32 and then rounded
    return int(weight.numel()) * (4 if weight.element_size() == 4 else 4 + int(weight.element_size()))


class _HeadAside:
    """In place of the head: makes tensors of the sizes of its outputs, and notes the bytes that are there when it would run.

    before: the most until its backward pass, where the counter begins anew; 0 if there is none.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter, self.live, self.before = counter, 0, 0

    def logps(self, hidden: torch.Tensor, targets: torch.Tensor, distribution: bool) -> tuple[torch.Tensor, ...]:
        """Three of (K,) float32. hidden: (K, hidden). targets: (K,)."""
        apply: Any = _Aside.apply
        outputs: tuple[torch.Tensor, ...] = apply(hidden, self)
        return outputs

    def note(self) -> None:
        self.live = max(self.live, self.counter.live)

    def turn(self) -> None:
        self.note()
        self.before, self.counter.peak = self.counter.peak, self.counter.live


class _Aside(torch.autograd.Function):
    """Keeps its input for backward, as the head does."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, aside: _HeadAside) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(hidden)
        ctx.aside = aside
        outputs = tuple(hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        ctx.mark_non_differentiable(*outputs[1:])
        aside.note()
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (hidden,) = ctx.saved_tensors
        ctx.aside.turn()
        return torch.empty_like(hidden), None


def _passes(scorer: Scorer, batch: Batch, training: bool) -> None:
    with nullcontext() if training else torch.no_grad():
        scores = scorer(batch, distribution=True, balance=True)
    if training:
        with own_errors(scorer.model):
            balanced = scores.balanced(scores.load, batch.pairs) if scores.load else scores
            (scores.logp_sum.sum() + (0 if balanced.balance is None else balanced.balance.sum())).backward()


def _without_content(scorer: Scorer, mode: FakeTensorMode, how: How, keep: int) -> Scorer:
    """A copy whose tensors have shapes alone, on the CPU. keep: number of decoder layers; 0: all."""
    memo: dict[int, Any] = {}
    gathered = {id(each) for layer in layers_of(scorer.model) for each in layer.parameters()} if how.sharded else set()
    # A gradient as large as all else of a short pass, at its end, would hide what grows with the layers.
    embedding = scorer.model.get_input_embeddings().weight if scorer.head else None
    with mode:
        for parameter in scorer.parameters():
            dtype = DTYPES[scorer.dtype] if id(parameter) in gathered else parameter.dtype
            shape = (1, *parameter.shape[1:]) if parameter is embedding else parameter.shape
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        for buffer in scorer.buffers():
            memo[id(buffer)] = _empty(buffer)
    made = copy.deepcopy(scorer, memo)
    made.model.get_input_embeddings().padding_idx = None
    for layer in quantized_layers(made.model):
        stand_in(layer, (layer.out_features, layer.in_features))
    for module in made.modules():
        # other kinds read positions, to choose frequencies of the same size
        if getattr(module, "rope_type", None) is not None:
            vars(module)["rope_type"] = "default"
    if keep:
        stack = stack_of(made.model)
        assert stack is not None
        del stack[keep:]
    if how.training and how.checkpointing:
        checkpoint_activations(made.model)
    return made


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
