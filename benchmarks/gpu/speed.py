"""Checks of speed and memory: both stages of the product beside a padded trainer with a live reference, at four sizes."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import LiveReference
from benchmarks.case import Case, Optimizer
from benchmarks.flops import useful_flops
from benchmarks.gpu.catalog import EXPECTED_SHARES
from benchmarks.gpu.figures import Figure, Machine, at_least, at_most, attempt, release
from benchmarks.gpu.material import (
    SIZES,
    Notes,
    Size,
    half_of,
    make_pairs,
    make_run,
    policy,
    reference,
    size_here,
    steps_of,
    tokens_of,
)  # fmt: skip
from benchmarks.gpu.memory import room_for
from benchmarks.gpu.values import wait
from benchmarks.measure import peak_gb
from minicache.pairs import PairTable
from minicache.scoring.batching import Indices
from minicache.scoring.budget import scoring_budget
from minicache.scoring.layout import settle_layout
from minicache.scoring.memory import bytes_of
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import Budget, score_table
from minicache.stages.train import _save_memory_and_time
from minicache.training.speed import peak_flops

STEPS_AT_ONCE = 3
LIVE_PAIRS = 16
# Cards with the H100's chip, for which the shares are expected.
HOPPER = ("H100", "H200", "H800", "GH200")


def speed(machine: Machine, name: str) -> Iterator[Figure]:
    """Tokens a second, memory and share of the peak of both stages, and the live-reference trainer's."""
    size = size_here(machine, SIZES[name])
    ways = room_for(machine, size)
    table = make_pairs(machine, 4 * size.unit, size.shape[-1])
    rates: dict[str, float] = {}
    shares = dict(zip(("stage one", "stage two"), EXPECTED_SHARES[name], strict=True))
    for stage, work in {"stage one": _stage_one, "stage two": _stage_two}.items():
        way = next((way for way, slots in ways[stage].items() if slots), None)
        if way is None:
            yield Figure(stage, f"skipped: {name} does not fit this card's memory, by the count of `minidpo fit`")
        else:
            yield Figure(f"{stage}: way", way)
            yield from attempt(stage, partial(work, machine, size, table, way, shares[stage], rates))
    if rates:
        yield from _live(machine, size, rates)


speed_64m, speed_600m, speed_1700m, speed_8b = (partial(speed, name=name) for name in SIZES)


def _stage_one(
    machine: Machine, size: Size, table: PairTable, way: str, share: float, rates: dict[str, float]
) -> Iterator[Figure]:
    model, notes = reference(machine, size), Notes()
    scorer = Scorer(model, half_of(machine))
    settle_layout(scorer, table, "auto", machine.world, notes)
    budget = Budget(scoring_budget(scorer, table, machine.world, notes))
    starts = iter(range(10**6))

    def unit() -> Indices:
        """Score the next pairs, as of a block."""
        indices = (next(starts) * size.unit + np.arange(size.unit)) % len(table)
        for _ in score_table(scorer, table, indices, budget, machine.device):
            pass
        return indices

    yield from _told(machine, "stage one", model, table, unit, rates, share)
    yield Figure(
        "stage one: layout, attention, token slots", f"{scorer.layout_name}, {scorer.kernel}, {budget.slots:,}"
    )
    yield Figure("stage one: notes", "; ".join(notes.lines))


def _stage_two(
    machine: Machine, size: Size, table: PairTable, way: str, share: float, rates: dict[str, float]
) -> Iterator[Figure]:
    model, notes = policy(machine, size), Notes()
    again = "computed again" in way
    run = make_run(machine, model, table, notes, batch_size=size.batch, activation_checkpointing=again)
    _save_memory_and_time(run)
    steps = steps_of(run)

    def unit() -> Indices:
        return np.concatenate([next(steps)() for _ in range(STEPS_AT_ONCE)])

    yield from _told(machine, "stage two", model, table, unit, rates, share)
    yield Figure(
        "stage two: layout, attention, token slots", f"{run.scorer.layout_name}, {run.scorer.kernel}, {run.budget:,}"
    )
    yield Figure("stage two: notes", "; ".join(notes.lines))


def _told(
    machine: Machine,
    stage: str,
    model: Any,
    table: PairTable,
    unit: Callable[[], Indices],
    rates: dict[str, float],
    share: float,
) -> Iterator[Figure]:
    """Figures of a stage whose unit of work is called until enough time has passed."""
    unit()
    timed, peak = _measured(machine, model, unit)
    pairs, seconds = np.concatenate([indices for indices, _ in timed]), sum(time for _, time in timed)
    rates[stage] = tokens_of(table, pairs) / seconds
    yield Figure(f"{stage}: distinct tokens", rates[stage], "a second")
    yield Figure(f"{stage}: pairs", len(pairs) / seconds, "a second")
    yield Figure(f"{stage}: weights", bytes_of(model.parameters()) / 1e9, "GB")
    yield Figure(f"{stage}: peak above the weights", peak, "GB")
    rate = useful_flops(model, table, pairs, stage == "stage two") / seconds
    yield Figure(f"{stage}: useful rate", rate / 1e12, "TFLOP/s")
    most = peak_flops(machine.device, half_of(machine))
    if most is None:
        yield Figure(f"{stage}: share of the peak", "the peak of this device is not known")
    elif any(card in torch.cuda.get_device_name() for card in HOPPER):
        yield at_least(f"{stage}: share of the peak", rate / most, share)
    else:
        yield Figure(f"{stage}: share of the peak", rate / most)


def _measured(machine: Machine, model: Any, unit: Callable[[], Indices]) -> tuple[list[tuple[Indices, float]], float]:
    """The pairs and seconds of units of work, for some seconds, and the peak GB above the weights.

    The peak holds the optimizer's state; on a CPU it is what the work adds to the process.
    """
    timed, least = [], 0.5 if machine.tiny else 3.0

    def work() -> None:
        started = time.monotonic()
        while time.monotonic() - started < least:
            wait(machine)
            begun = time.perf_counter()
            indices = unit()
            wait(machine)
            timed.append((indices, time.perf_counter() - begun))

    if not machine.has_cuda:
        return timed, peak_gb(work)
    torch.cuda.reset_peak_memory_stats()
    work()
    return timed, (torch.cuda.max_memory_allocated() - bytes_of(model.parameters())) / 1e9


def _live(machine: Machine, size: Size, rates: dict[str, float]) -> Iterator[Figure]:
    """The padded trainer's tokens a second beside ours, with the largest micro-batch of 4, 2 or 1 pairs that fits."""
    for micro_pairs in (4, 2, 1):
        found = list(attempt("live reference", partial(_live_figures, machine, size, rates, micro_pairs)))
        full = any("out of memory" in each.error for each in found)
        if not full or micro_pairs == 1:
            # a trainer that does not fit is a finding, and no failure of ours
            yield from (Figure(each.name, "does not fit") if full and each.error else each for each in found)
            return
        release()


def _live_figures(machine: Machine, size: Size, rates: dict[str, float], micro_pairs: int) -> Iterator[Figure]:
    pairs = 4 if machine.tiny else LIVE_PAIRS
    table = make_pairs(machine, pairs, size.shape[-1], seed=1)
    case = Case(
        name="",
        model=policy(machine, size),
        table=table,
        device=machine.device,
        dtype=half_of(machine),
        layout="auto",
        micro_pairs=micro_pairs,
        budget=1,
        tokenizer=Path(),
        file_padding=1.0,
    )
    live = LiveReference(case, Optimizer(case.model))

    def step() -> Indices:
        live.step(case.everything)
        return case.everything

    def score() -> Indices:
        live.reference()
        return case.everything

    for stage, unit in {"stage one": score, "stage two": step}.items():
        if stage not in rates:
            continue
        unit()
        timed, peak = _measured(machine, case.model, unit)
        rate = len(timed) * tokens_of(table, case.everything) / sum(time for _, time in timed)
        yield Figure(f"live reference, {stage}: distinct tokens", rate, "a second")
        yield Figure(f"live reference, {stage}: peak above one model's weights", peak, "GB")
        yield at_least(f"ours over live reference, {stage}: tokens a second", rates[stage] / rate, 1.0)
    yield Figure("live reference: pairs of a micro-batch", float(micro_pairs))


def compiled(machine: Machine) -> Iterator[Figure]:
    """Optimizer steps of a 0.6B model with `train --compile`, beside eager ones."""
    size = size_here(machine, SIZES["0.6B"])
    if not any(room_for(machine, size)["stage two"].values()):
        yield Figure("0.6B", "skipped: it does not fit this card's memory")
        return
    table, rates = make_pairs(machine, 4 * size.unit, size.shape[-1]), {}
    for name in ("eager", "compiled") if machine.has_cuda else ("eager",):
        model = policy(machine, size)
        run = make_run(machine, model, table, batch_size=size.batch, compile=name == "compiled")
        _save_memory_and_time(run)
        steps, started = steps_of(run), time.monotonic()
        for _ in range(2):
            next(steps)()
        wait(machine)
        yield Figure(f"{name}: the first two steps", time.monotonic() - started, "s")
        timed, peak = _measured(machine, model, lambda steps=steps: next(steps)())  # type: ignore[misc]
        rates[name] = sum(tokens_of(table, pairs) for pairs, _ in timed) / sum(seconds for _, seconds in timed)
        yield Figure(f"{name}: distinct tokens", rates[name], "a second")
        yield Figure(f"{name}: peak above the weights", peak, "GB")
        del model, run, steps
        release()
    machine.needs_gpu("the compiled decoder")
    yield at_most("eager over compiled: tokens a second", rates["eager"] / rates["compiled"], 1.0)
