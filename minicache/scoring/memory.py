"""What a stage needs of a device's memory, as numbers: of weights, of a step's state, and of passes over so many token slots."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from minicache.models import layers_of
from minicache.options.catalog import WEIGHTS
from minicache.scoring.scorer import DTYPES, Scorer

# What to try where memory is full.
TO_TRAIN = (
    "--activation-checkpointing, --optimizer adamw-8bit or --lora-rank 16 (minidpo fit --model shows what each needs)"
)
TO_SCORE = "--base-4bit, a lower --max-length, or --parallel fsdp on several devices (minidpo fit --model shows what they need)"


@dataclass(frozen=True)
class Line:
    """Bytes for a number of pairs: fixed + pairs x pair."""

    fixed: float
    pair: float

    def __call__(self, pairs: float) -> float:
        return self.fixed + pairs * self.pair

    @classmethod
    def through(cls, one: float, two: float) -> "Line":
        """The line of what one pair takes and what two take."""
        pair = max(1.0, two - one)
        return cls(max(0.0, one - pair), pair)


@dataclass(frozen=True)
class Pass:
    """Bytes of a pass beside weights and gradients. slots: token slots of a pair.

    forward, backward: the most while the layers run. at_head: what is there while the head runs. head: what the head makes
    beside it, for any number of pairs; kept: what of this stays until the end (the gradient of a weight that is the embedding's
    too). of_pair: what the head makes for a pair, as long as it is less than `head`. end: what there is while the embedding
    computes.
    """

    forward: Line
    at_head: Line
    backward: Line
    slots: int
    head: float = 0.0
    kept: float = 0.0
    of_pair: float = 0.0
    end: float = 0.0

    def bytes(self, slots: float) -> float:
        """The most bytes at once, of a batch of so many token slots."""
        pairs = slots / self.slots
        head = min(self.head, pairs * self.of_pair)
        return max(self.forward(pairs), self.at_head(pairs) + head, self.backward(pairs) + self.kept, self.end)

    @property
    def _lines(self) -> tuple[Line, Line, Line]:
        return self.forward, self.at_head, self.backward

    @property
    def fixed(self) -> float:
        """Bytes that depend on no slot, without the head's: casts of weights and the like."""
        return max(line.fixed for line in self._lines)

    @property
    def slot(self) -> float:
        """Bytes of a token slot, of many."""
        return max(line.pair for line in self._lines) / self.slots

    def longer(self, slots: int) -> "Pass":
        """The same with pairs of so many token slots."""
        factor = slots / self.slots
        forward, at_head, backward = (Line(line.fixed, line.pair * factor) for line in self._lines)
        return Pass(forward, at_head, backward, slots, self.head, self.kept, self.of_pair * factor, self.end)


@dataclass(frozen=True)
class How:
    """What is counted. training: with backward; else without gradients. checkpointing: layers are computed again in backward.

    kind: of the device. sharded: layers are gathered from shards, in the precision of the passes.
    """

    training: bool
    checkpointing: bool = False
    kind: str = "cpu"
    sharded: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs on each device.

    weights, gradients, optimizer: of this device's share. copies: what FSDP gathers and reduces at once.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    passes: Pass

    @property
    def state(self) -> float:
        """What stays from step to step beside the weights."""
        return self.gradients + self.optimizer + self.copies

    def slots(self, free: float) -> int:
        """Token slots for which this many bytes, without the weights, suffice."""
        low, high = 0, 2**24
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.state + self.passes.bytes(middle) <= free
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def power(self, free: float, most: int) -> int:
        """The same as a power of two of at least 1, so that small differences in free memory change nothing."""
        return min(most, 1 << max(0, self.slots(free).bit_length() - 1))


def need_of(scorer: Scorer, passes: Pass, optimizer: str | None) -> Need:
    """What each device needs. optimizer: a name in OPTIMIZERS; None: nothing is trained.

    With DDP it is what one device alone needs: gradients lie in the buckets that are sent.
    """
    everything = {id(each): each for each in scorer.parameters()}.values()
    trained = [each for each in everything if each.requires_grad] if optimizer else []
    state, sharded = 0.0, scorer.shards > 1
    if optimizer:
        half = any(each.dtype == torch.bfloat16 for each in trained)
        entry = WEIGHTS["bfloat16" if half else "float32"][optimizer]
        state = entry.state_bytes * sum(each.numel() for each in trained)
    return Need(
        weights=bytes_of(everything) / scorer.shards,
        gradients=bytes_of(trained) / scorer.shards,
        optimizer=state / scorer.shards,
        copies=_gathered(scorer, bool(optimizer)) if sharded else 0.0,
        passes=_with_ends(scorer, passes, bool(optimizer)) if sharded else passes,
    )


def _ends(scorer: Scorer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights of the embedding, and those of the head, which lie in units of their own; none if they are in the root's."""
    if not scorer.head or not scorer.ends_apart:
        return [], []
    embedding, head = scorer.model.get_input_embeddings(), scorer.head.linear
    return list(embedding.parameters()), list(head.parameters())


def _gathered(scorer: Scorer, training: bool) -> float:
    """Bytes of the shards that FSDP gathers while layers compute: the root's as held, and two layers in the passes' precision.

    While one layer computes, the next is gathered. In backward their gradients are there too, and in float32 while they are
    reduced; the root's gradients are whole until its backward ends.
    """
    layers: list[list[torch.Tensor]] = [list(layer.parameters()) for layer in layers_of(scorer.model)]
    others = {id(each) for unit in [*layers, *_ends(scorer)] for each in unit}
    root = {id(each): each for each in scorer.parameters() if id(each) not in others}.values()
    size = DTYPES[scorer.dtype].itemsize
    largest = max(layers, key=lambda layer: sum(each.numel() for each in layer))
    trained = sum(each.numel() for each in largest if each.requires_grad)
    total = float(bytes_of(root)) + 2.0 * size * sum(each.numel() for each in largest)
    if training:
        total += 2 * 4 * sum(each.numel() for each in root if each.requires_grad) + (size + 4) * trained
    return total


def _with_ends(scorer: Scorer, passes: Pass, training: bool) -> Pass:
    """The passes with the embedding and the head gathered while each computes: its weight, and the buffer in which it came.

    In backward the buffer is that in which the gradient goes. A tied weight is not gathered for the gradient of the embedding.
    """
    embedding, head = (2.0 * bytes_of(each) for each in _ends(scorer))
    tied = scorer.head is not None and scorer.head.linear.weight is scorer.model.get_input_embeddings().weight
    trained = training and any(each.requires_grad for each in _ends(scorer)[0])
    return replace(
        passes,
        at_head=Line(passes.at_head.fixed + head, passes.at_head.pair),
        end=max(embedding, passes.end + (embedding if trained and not tied else 0)),
    )


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; one that is there several times is counted once."""
    return sum({id(each): each.numel() * each.element_size() for each in tensors}.values())


def parts_of(need: Need) -> str:
    """What stays from step to step beside the weights, as text."""
    parts = {"gradients": need.gradients, "the optimizer": need.optimizer, "copies between processes": need.copies}
    return ", ".join(f"{gigabytes(size)} for {name}" for name, size in parts.items() if size) or "nothing"


def gigabytes(size: float) -> str:
    """A size as text: in GB, or smaller units, of powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} bytes"
