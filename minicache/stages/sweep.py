"""Many runs of stage two from one cache, one after another, and a table of their results. Pairs and model are read once."""

import gc
import logging
import math
import time
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.disk import read_json, write_json
from minicache.errors import ConfigError, OutputError, RunDiverged
from minicache.failures import writing
from minicache.models import LoadedModel, load_model
from minicache.options.sweep import SweepConfig, SweepRun
from minicache.options.train import TrainConfig
from minicache.pictures.sweep import draw_sweep
from minicache.processes.devices import empty_cache, forget_most_memory
from minicache.processes.world import World
from minicache.reports.names import moved
from minicache.reports.sweep import RunResult, SweepReport
from minicache.scoring.dtype import agreed_dtype
from minicache.scoring.layout import settle_layout
from minicache.scoring.loading import Sources, load_pairs
from minicache.scoring.spread import is_sharded, spread
from minicache.scoring.tables import score_table
from minicache.stages.train import train_locked
from minicache.strict import read_as
from minicache.trackers import Tracker
from minicache.training.lock import RunLock
from minicache.training.losses import Objective
from minicache.training.order import pairs_in
from minicache.training.policy import quantization_for
from minicache.training.progress import Progress
from minicache.training.run_directory import RunRecord, read_record, write_record

log = logging.getLogger(__name__)

REPORT, PICTURE = "sweep.json", "sweep.png"
# Pairs that the timed forward pass scores; pairs scored before it, so that nothing is compiled or allocated while timing.
TIMED_PAIRS, WARM_UP = 32, 4


def sweep(config: SweepConfig, world: World, tracker: Tracker) -> SweepReport:
    """Do this job's remaining runs; returns the results of all runs of the sweep.

    A run that diverges is recorded as failed, and the next one begins. Every other error ends the sweep; the same call goes on
    with it.

    Raises:
        MinicacheError: as `train`. KeyboardInterrupt: on SIGINT or SIGTERM, after the run's state was saved.
    """
    _check(config)
    config = world.first(lambda: _as_begun(config))
    kept = _Kept()
    rate, worked = world.first(lambda: _known_rate(config.out / REPORT)), False
    for run in config.mine:
        worked |= _do(run, config, kept, world, tracker)
    if rate is None or worked:
        rate = _forward_rate(config.runs[0].config, kept, world, tracker)
    return world.first(lambda: _reported(config, rate, tracker))


def _known_rate(file: Path) -> float | None:
    """Pairs a second of a forward pass by an earlier call. Raises OutputError: the file is not of this program's."""
    name = "reference_pairs_per_second"
    try:
        rate: float | None = read_as(float | None, read_json(file).get(name), name)
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {rate:g}")
    except ValueError as error:
        raise OutputError(f"{file}: {error}; remove it, and the same command writes it anew") from error
    return rate


def _reported(config: SweepConfig, rate: float, tracker: Tracker) -> SweepReport:
    """The results of all runs, written and drawn."""
    report = _report(config, rate)
    write_json(config.out / REPORT, asdict(report))
    _draw(report, tracker)
    return report


def _check(config: SweepConfig) -> None:
    """Raises ConfigError: options with which a run would fail in the middle of the sweep."""
    for run in config.runs:
        options = run.config
        objective = Objective.parse(options.loss, options.logps, options.beta, options.loss_options)
        if name := objective.over_the_batch:
            raise ConfigError(
                f"--loss {name}: sorts over a training batch, so it cannot judge held-out pairs; leave it out of the sweep"
            )


def _as_begun(config: SweepConfig) -> SweepConfig:
    """The sweep with one beta for all runs that leave it open and compare logps alike: that of those which are begun.

    The default of the release that began them may have been another.
    """
    records = [record for run in config.runs if (record := read_record(run.config.out))]
    betas = {record.options["logps"]: record.options["beta"] for record in records}
    runs = [
        replace(run, config=replace(run.config, beta=betas.get(run.config.logps))) if run.config.beta is None else run
        for run in config.runs
    ]
    return replace(config, runs=tuple(runs))


def _do(run: SweepRun, config: SweepConfig, kept: "_Kept", world: World, tracker: Tracker) -> bool:
    """Begin a run, resume it, or leave it as it is. Returns whether anything was done."""
    out = run.config.out
    with RunLock(out) as lock:
        if not world.first(lambda: _take(out, lock)):
            tracker.note(f"{run.name}: another process is at work on it; left to that process")
            return False
        record = world.first(lambda: read_record(out))
        tracker.note(f"run {config.runs.index(run) + 1} of {len(config.runs)}: {run.name}")
        if record and record.failed and not record.outcome:
            tracker.note(f"it failed before: {record.failed}")
            return False
        _train(run, record, lock, kept, world, tracker)
        return not (record and record.outcome)


def _take(out: Path, lock: RunLock) -> bool:
    """Make the run's directory and try to hold it."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return lock.take()


def _train(
    run: SweepRun, record: RunRecord | None, lock: RunLock, kept: "_Kept", world: World, tracker: Tracker
) -> None:
    """Train a run, resuming it if it has a record. A run that diverges is recorded as failed."""
    sources = Sources(kept.pairs, kept.model)
    try:
        train_locked(replace(run.config, resume=record is not None), lock, world, tracker, sources)
    except RunDiverged as error:
        tracker.note(f"{run.name} failed: {error}")
        problem = str(error)
        world.first(lambda: _write_failed(run.config.out, problem))
    except KeyboardInterrupt as interruption:
        saved = f"{run.name}: the state is saved; " if str(interruption) else ""
        raise KeyboardInterrupt(f"{saved}the same command goes on with the sweep") from None
    _free_memory(world)


def _write_failed(out: Path, problem: str) -> None:
    record = read_record(out)
    assert record, "a run that took a step has a record"
    write_record(out, replace(record, failed=problem))


def _free_memory(world: World) -> None:
    """Free the memory of the last run, so that the next has as much as the first."""
    gc.collect()
    empty_cache(world.device)
    forget_most_memory(world.device)


class _Kept:
    """Pairs and models, read once for all runs. A model stays on the CPU as it was stored; each run gets a copy to change."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[tuple[str, int], ...], CachedPairs] = {}
        self._models: dict[tuple[str, str], LoadedModel] = {}

    def pairs(
        self, cache: ReferenceCache | JoinedCaches, scratch: Path | None, world: World, tracker: Tracker
    ) -> CachedPairs:
        # The number of pairs is part of the key: a cache that has grown since is decoded again.
        key = tuple((str(part.path), part.log.pairs) for part in cache.contents.parts)
        if key not in self._pairs:
            log.debug("decoding the pairs of %s", key)
            self._pairs[key] = load_pairs(cache, scratch, world, tracker)
        return self._pairs[key]

    def model(self, source: str, trust_remote_code: bool, quantization: str) -> LoadedModel:
        key = source, quantization
        if key not in self._models:
            self._models[key] = load_model(source, trust_remote_code, quantization)
        kept = self._models[key]
        # Computed once, here: the copies take it along.
        assert kept.fingerprint
        return deepcopy(kept)


# --- results ---


def _forward_rate(config: TrainConfig, kept: _Kept, world: World, tracker: Tracker) -> float:
    """Pairs per second that all processes together score with the model the runs began from, as a live reference would."""
    caches = JoinedCaches([ReferenceCache(where) for where, _ in config.caches])
    table = kept.pairs(caches, config.scratch, world, tracker).table
    tracker.begin("timing a forward pass", None)
    source = config.init_from or config.model or caches.caches[0].log.model
    mine = world.is_main or not is_sharded(config.parallel, world)
    quantization = quantization_for(config, caches.caches[0])
    load = partial(kept.model, source, config.trust_remote_code, quantization)
    model = world.each(lambda: load().model if mine else None)
    dtype = agreed_dtype(config.dtype, world, tracker.note, is_sharded(config.parallel, world))
    scorer = spread(model, dtype, config.parallel, world)
    settle_layout(scorer, table, config.layout, world, tracker)
    sample = np.unique(np.linspace(0, len(table) - 1, TIMED_PAIRS).astype(np.int64))
    for pairs in (sample[:WARM_UP], sample):
        world.barrier()
        started = time.monotonic()
        budget = config.tokens_per_micro_batch
        for _, _, scores in score_table(scorer, table, pairs[world.rank :: world.size], budget, world.device):
            # Reading a number waits for the device.
            scores.logp_sum.sum().item()
        world.barrier()
    return len(sample) / (time.monotonic() - started)


def _report(config: SweepConfig, rate: float) -> SweepReport:
    results = sorted((_result(run) for run in config.runs), key=_rank)
    caches = config.runs[0].config.caches
    scored = sum(ReferenceCache(where).log.pairs for where, _ in caches)
    trained = sum(result.pairs_trained for result in results)
    return SweepReport(
        out=config.out,
        swept=list(config.runs[0].options),
        runs=results,
        reference_passes=trained,
        cached_pairs=scored,
        reference_pairs_per_second=rate,
        seconds_not_spent=trained / rate,
        stage_one_seconds=scored / rate,
    )


def _result(run: SweepRun) -> RunResult:
    record = read_record(run.config.out)
    outcome = record.outcome if record else None
    progress = outcome.progress if outcome else Progress()
    return RunResult(
        name=run.name,
        options=run.options,
        state=_state(record),
        problem=record.failed if record else None,
        held_out=progress.validation,
        steps=progress.step,
        model_step=outcome.model_step if outcome else None,
        pairs_trained=pairs_in(progress.step, record.pairs, run.config.batch_size) if record and progress.step else 0,
        seconds=progress.total_seconds,
    )


def _state(record: RunRecord | None) -> str:
    """The state of a run: not begun, unfinished, failed or done."""
    if record is None:
        return "not begun"
    if record.outcome:
        return "done"
    return "failed" if record.failed else "unfinished"


def _rank(result: RunResult) -> tuple[Any, ...]:
    """The key that sorts runs: highest accuracy first, among equals the lowest KL; runs without a result last."""
    if result.held_out is None:
        return (1, ("failed", "unfinished", "not begun", "done").index(result.state), result.name)
    return (0, -result.held_out["rewards/accuracy"], result.held_out[moved(result.held_out)], result.name)


def _draw(report: SweepReport, tracker: Tracker) -> None:
    """Draw the results, if there are any and matplotlib is installed."""
    if not any(result.held_out for result in report.runs):
        return
    try:
        draw_sweep(report, report.out / PICTURE)
    except ConfigError as error:
        tracker.note(f"no picture: {error}")
