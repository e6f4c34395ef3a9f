"""What both stages need of a device's memory, and which options fit it: from a model's config, before anything is loaded."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from shlex import quote
from subprocess import list2cmdline

import numpy as np

from minicache.disk import WINDOWS
from minicache.errors import ModelError
from minicache.models import layers_of
from minicache.models.huggingface import quiet
from minicache.models.outline import Outline, outline_of
from minicache.options.base import flag_of
from minicache.options.catalog import ROUNDING
from minicache.options.declare import flag
from minicache.options.fit import FitConfig, bytes_in
from minicache.options.lora import NO_LORA, LoraOptions
from minicache.pairs import EncodedPair, PairTable
from minicache.processes.devices import accelerators, facts_of
from minicache.processes.world import World
from minicache.scoring.budget import MOST, RESERVE
from minicache.scoring.counting import counted_pass
from minicache.scoring.foresight import Held
from minicache.scoring.memory import How, Need, need_of
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import SLOTS
from minicache.text import one_line
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# Cards to look at where there is no GPU and none is named.
CARDS = ("24GB", "40GB", "80GB")
KIND = "cuda"
# What "auto" means there.
DTYPE = "bfloat16"
RANK = 16


@dataclass(frozen=True)
class Way:
    """A way to run a stage, and the bytes it needs on each device.

    stage: the command. name: what is held or trained, in words. options: of the command. slot: bytes of a token slot.
    room: memory -> token slots of the largest batch that fits, 0 if not even the longest pair does. commands: memory -> the
    command to type, where it fits.
    """

    stage: str
    name: str
    options: tuple[str, ...]
    checkpointing: bool
    weights: float
    gradients: float
    optimizer: float
    copies: float
    head: float
    fixed: float
    slot: float
    room: dict[str, int]
    commands: dict[str, str]


@dataclass(frozen=True)
class FitReport:
    """parameters: of the model. longest: token slots of the longest pair. devices: their number. memory: name -> bytes of each."""

    model: str
    parameters: int
    dtype: str
    layout: str
    longest: int
    devices: int
    parallel: str
    memory: dict[str, float]
    ways: list[Way]


@dataclass(frozen=True)
class _Plan:
    """A way before it is counted. trained: stage two. weights: precision of those that are trained, without adapters."""

    name: str
    trained: bool
    lora: LoraOptions = NO_LORA
    quantization: str = ""
    weights: str = "float32"


def fit(config: FitConfig, world: World, tracker: Tracker) -> FitReport:
    """Count what each way to run the stages needs. Raises ModelError: there is no such model, or its memory cannot be counted."""
    quiet()
    config = replace(config, dtype=DTYPE if config.dtype == "auto" else config.dtype)
    tracker.begin(f"reading the config of {config.model}", None)
    outline = outline_of(config.model, config.trust_remote_code)
    memory = _memory(config)
    ways, layout, longest = [], "", 0
    for plan in _plans(config, outline):
        tracker.begin(f"counting the memory of {plan.name}", None)
        scorer = _scorer(config, outline, plan)
        layout, longest = scorer.layout_name, int(scorer.layout.costs(_pairs(config, 1).lengths)[0])
        # some families mark no layers that could be computed again
        both = plan.trained and bool(layers_of(scorer.model))
        ways += [_way(config, plan, scorer, checkpointing, memory) for checkpointing in (False, True)[: 1 + both]]
    return FitReport(
        model=config.model,
        parameters=sum(each.numel() for each in outline.model.parameters()),
        dtype=config.dtype,
        layout=layout,
        longest=longest,
        devices=config.nproc,
        parallel=config.parallel,
        memory=memory,
        ways=ways,
    )


def _memory(config: FitConfig) -> dict[str, float]:
    if config.memory:
        return config.sizes()
    if found := accelerators():
        card = facts_of(found[0])
        return {card.name: float(card.memory)}
    return {name: bytes_in(name) for name in CARDS}


def _plans(config: FitConfig, outline: Outline) -> Iterator[_Plan]:
    """The ways that were asked for; without a wish: all weights, in both precisions, adapters, adapters on 4 bits."""
    asked, quantization = config.lora.wanted, config.base.quantization
    lora = config.lora if config.lora.lora_rank else LoraOptions(lora_rank=RANK)
    bits = {"nf4-double": "4 bits", "int8": "8 bits"}
    held = (
        [quantization]
        if asked or quantization
        else ["", *([] if config.sharded or outline.quantization else ["nf4-double"])]
    )
    for each in held:
        yield _Plan(f"the reference in {bits[each]}" if each else "the reference", False, NO_LORA, each)
    if not asked and not quantization and not outline.quantization:
        if config.weights == "float32":
            yield _Plan("all weights", True)
        narrow = "" if config.sharded or config.optimizer not in ROUNDING else "bfloat16"
        if config.dtype == narrow:
            yield _Plan("all weights, in bfloat16", True, weights="bfloat16")
    for each in held if config.weights == "float32" else []:
        on = f", base in {bits[each]}" if each else ""
        yield _Plan(f"adapters of rank {lora.lora_rank}{on}", True, lora, each)


def _scorer(config: FitConfig, outline: Outline, plan: _Plan) -> Scorer:
    held = Held(
        dtype=config.dtype,
        lora=plan.lora,
        quantization=plan.quantization,
        trained=plan.trained,
        weights=plan.weights,
        shards=config.nproc if config.sharded else 1,
    )
    scorer = held.scorer(replace(outline, model=copy.deepcopy(outline.model)), config.max_length)
    if not accelerators():
        # of the machine that is meant, whatever this one lacks
        scorer.kernel = "flex"
    return scorer


def _pairs(config: FitConfig, count: int) -> PairTable:
    """Pairs of the longest length, half of it prompt."""
    prompt = config.max_length // 2
    answer = config.max_length - prompt
    tokens = prompt + 2 * answer
    mask = (np.arange(tokens) >= prompt).astype(np.uint8)
    pair = EncodedPair(np.ones(tokens, np.int32), mask, (prompt, answer, answer))
    return PairTable.from_pairs([pair] * count, "int32")


def _way(config: FitConfig, plan: _Plan, scorer: Scorer, checkpointing: bool, memory: dict[str, float]) -> Way:
    how = How(training=plan.trained, checkpointing=checkpointing, kind=KIND, sharded=scorer.shards > 1)
    one, two = (scorer.layout.make(_pairs(config, count), np.arange(count)) for count in (1, 2))
    try:
        passes = counted_pass(scorer, one, two, how)
    # a family's own code, which may read the values of tensors, may raise anything
    except Exception as error:
        log.debug("the memory cannot be counted", exc_info=True)
        raise ModelError(
            f"{config.model}: its memory cannot be counted from its config, because its code reads values: {one_line(error, 200)}; "
            "expected another family, or train --tokens-per-micro-batch 1024 to try"
        ) from error
    need = need_of(scorer, passes, config.optimizer if plan.trained else None)
    passes = need.passes
    options = _options(config, plan, checkpointing)
    room = {name: _room(need, size, plan.trained) for name, size in memory.items()}
    return Way(
        stage="train" if plan.trained else "precompute-ref",
        name=plan.name,
        options=options,
        checkpointing=checkpointing,
        weights=need.weights,
        gradients=need.gradients,
        optimizer=need.optimizer,
        copies=need.copies,
        head=max(passes.head, passes.kept),
        fixed=passes.fixed,
        slot=passes.slot,
        room=room,
        commands={name: _command(config, plan, options, slots) for name, slots in room.items() if slots},
    )


def _room(need: Need, size: float, training: bool) -> int:
    """Token slots of the largest batch on a device of this size; 0 if the longest pair does not fit."""
    free = RESERVE * size - need.weights
    if need.slots(free) < need.passes.slots:
        return 0
    return need.power(free, (MOST if training else SLOTS)[KIND])


def _options(config: FitConfig, plan: _Plan, checkpointing: bool) -> tuple[str, ...]:
    """The options of the stage's command that this way needs."""
    found = []
    for item in fields(plan.lora):
        value = getattr(plan.lora, item.name)
        if value != item.default:
            found.append(flag(item.name) if value is True else f"{flag(item.name)} {_quoted(str(value))}")
    if plan.quantization and not plan.trained:
        found.append(flag_of(plan.quantization))
    if plan.weights != "float32":
        found.append(f"--weights {plan.weights}")
    if plan.trained and config.optimizer != "adamw":
        found.append(f"--optimizer {config.optimizer}")
    if checkpointing:
        found.append("--activation-checkpointing")
    if config.dtype != DTYPE:
        found.append(f"--dtype {config.dtype}")
    if config.trust_remote_code:
        found.append("--trust-remote-code")
    if config.nproc > 1:
        found.append(f"--nproc {config.nproc}" + (f" --parallel {config.parallel}" if config.parallel != "ddp" else ""))
    return tuple(found)


def _quoted(argument: str) -> str:
    """The argument as the system's shells take it."""
    return list2cmdline([argument]) if WINDOWS else quote(argument)


def _command(config: FitConfig, plan: _Plan, options: tuple[str, ...], slots: int) -> str:
    cache = {"nf4-double": "cache-4bit/", "int8": "cache-8bit/"}.get(plan.quantization, "cache/")
    if plan.trained:
        fixed, budget = f"minidpo train --ref-cache {cache} --out run/", f"--tokens-per-micro-batch {slots}"
    else:
        fixed = f"minidpo precompute-ref --model {_quoted(config.model)} --data pairs.jsonl --ref-cache {cache}"
        budget = f"--max-length {config.max_length} --tokens-per-batch {slots}"
    return " ".join([fixed, *options, budget])
