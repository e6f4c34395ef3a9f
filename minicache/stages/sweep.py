"""Many runs of stage two from one cache, one after another: pairs decoded once, the model read once; then a table of them."""

import gc
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.disk import read_json, write_json, writing
from minicache.errors import ConfigError, RunDiverged
from minicache.models import LoadedModel, load_model
from minicache.options.sweep import SweepConfig, SweepRun
from minicache.options.train import TrainConfig
from minicache.pictures.sweep import draw_sweep
from minicache.processes.world import World
from minicache.reports.sweep import RunResult, SweepReport
from minicache.scoring.layout import settle_layout
from minicache.scoring.loading import Sources, load_pairs
from minicache.scoring.scorer import resolve_dtype
from minicache.scoring.spread import is_sharded, spread
from minicache.scoring.tables import score_table
from minicache.stages.train import train_locked
from minicache.trackers import Tracker
from minicache.training.lock import RunLock
from minicache.training.losses import Objective
from minicache.training.order import pairs_in
from minicache.training.progress import Progress
from minicache.training.run_directory import RunRecord, read_record, write_record

REPORT, PICTURE = "sweep.json", "sweep.png"
# To measure a forward pass by; and scored before that, so that nothing is compiled or allocated in it.
TIMED_PAIRS, WARM_UP = 32, 4


def sweep(config: SweepConfig, world: World, tracker: Tracker) -> SweepReport:
    """Do what is left of this job's runs, and say how all runs of the sweep stand.

    A run that diverges is recorded as failed and the next begins; everything else ends the sweep, which goes on when it is
    called again.

    Raises:
        MinicacheError: as `train`. KeyboardInterrupt: on SIGINT or SIGTERM, after the run's state was saved.
    """
    _check(config)
    kept = _Kept()
    before, worked = world.broadcast(read_json(config.out / REPORT) if world.is_main else None), False
    for run in config.mine:
        worked |= _do(run, config, kept, world, tracker)
    rate = before.get("reference_pairs_per_second")
    if rate is None or worked:
        rate = _forward_rate(config.runs[0].config, kept, world, tracker)
    report = world.broadcast(_report(config, rate) if world.is_main else None)
    if world.is_main:
        write_json(config.out / REPORT, asdict(report))
        _draw(report, tracker)
    return report


def _check(config: SweepConfig) -> None:
    """What would stop a run in the midst of the sweep. Raises ConfigError."""
    for run in config.runs:
        options = run.config
        objective = Objective.parse(options.loss, options.logps, options.beta, options.loss_options)
        if name := objective.over_the_batch:
            raise ConfigError(
                f"--loss {name}: sorts over a training batch, so it cannot judge held-out pairs; leave it out of the sweep"
            )


def _do(run: SweepRun, config: SweepConfig, kept: "_Kept", world: World, tracker: Tracker) -> bool:
    """One run, begun, gone on with, or left as it is. Returns whether there was anything to do."""
    out = run.config.out
    with RunLock(out) as lock:
        if world.is_main:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
        if not world.broadcast(lock.take() if world.is_main else None):
            tracker.note(f"{run.name}: another process is at work on it, and it is left to that one")
            return False
        record = world.broadcast(read_record(out) if world.is_main else None)
        tracker.note(f"run {config.runs.index(run) + 1} of {len(config.runs)}: {run.name}")
        if record and record.failed and not record.outcome:
            tracker.note(f"it failed before: {record.failed}")
            return False
        _go_on(run, record, lock, kept, world, tracker)
        return not (record and record.outcome)


def _go_on(
    run: SweepRun, record: RunRecord | None, lock: RunLock, kept: "_Kept", world: World, tracker: Tracker
) -> None:
    sources = Sources(kept.pairs, kept.model)
    try:
        train_locked(replace(run.config, resume=record is not None), lock, world, tracker, sources)
    except RunDiverged as error:
        tracker.note(f"{run.name} failed: {error}")
        if world.is_main:
            _write_failed(run.config.out, str(error))
    except KeyboardInterrupt as interruption:
        saved = f"{run.name}: the state is saved; " if str(interruption) else ""
        raise KeyboardInterrupt(f"{saved}the same command goes on with the sweep") from None
    _let_go(world)


def _write_failed(out: Path, problem: str) -> None:
    record = read_record(out)
    assert record, "a run that took a step has a record"
    write_record(out, replace(record, failed=problem))


def _let_go(world: World) -> None:
    """Of what the run before held, so that the next finds the memory that the first one found."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)


class _Kept:
    """Reads pairs and model once for all runs. The model stays on the CPU as it was stored; each run gets a copy to change."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[tuple[str, int], ...], CachedPairs] = {}
        self._models: dict[str, LoadedModel] = {}

    def pairs(
        self, cache: ReferenceCache | JoinedCaches, scratch: Path | None, world: World, tracker: Tracker
    ) -> CachedPairs:
        # a cache that was added to since is decoded anew
        key = tuple((str(part.path), part.log.pairs) for part in cache.contents.parts)
        if key not in self._pairs:
            self._pairs[key] = load_pairs(cache, scratch, world, tracker)
        return self._pairs[key]

    def model(self, source: str, trust_remote_code: bool) -> LoadedModel:
        if source not in self._models:
            self._models[source] = load_model(source, trust_remote_code)
        kept = self._models[source]
        assert kept.fingerprint  # computed here once: the copies take it along
        return deepcopy(kept)


# --- what came of it ---


def _forward_rate(config: TrainConfig, kept: _Kept, world: World, tracker: Tracker) -> float:
    """Pairs a second that all processes together score with the model the runs began from, as a live reference would."""
    caches = JoinedCaches([ReferenceCache(where) for where, _ in config.caches])
    table = kept.pairs(caches, config.scratch, world, tracker).table
    tracker.begin("timing a forward pass", None)
    source = config.init_from or config.model or caches.caches[0].log.model
    mine = world.is_main or not is_sharded(config.parallel, world)
    model = kept.model(source, config.trust_remote_code).model if mine else None
    scorer = spread(model, resolve_dtype(config.dtype, world.device), config.parallel, world)
    settle_layout(scorer, table, config.layout, world.device, tracker)
    sample = np.unique(np.linspace(0, len(table) - 1, TIMED_PAIRS).astype(np.int64))
    for pairs in (sample[:WARM_UP], sample):
        world.barrier()
        started = time.monotonic()
        budget = config.tokens_per_micro_batch
        for _, _, scores in score_table(scorer, table, pairs[world.rank :: world.size], budget, world.device):
            scores.logp_sum.sum().item()  # waits for the device
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
    if record is None:
        return "not begun"
    if record.outcome:
        return "done"
    return "failed" if record.failed else "unfinished"


def _rank(result: RunResult) -> tuple[Any, ...]:
    """The best first: by accuracy, and of two alike the one that went less far for it; those without a result last."""
    if result.held_out is None:
        return (1, ("failed", "unfinished", "not begun", "done").index(result.state), result.name)
    return (0, -result.held_out["rewards/accuracy"], result.held_out["kl"], result.name)


def _draw(report: SweepReport, tracker: Tracker) -> None:
    if not any(result.held_out for result in report.runs):
        return
    try:
        draw_sweep(report, report.out / PICTURE)
    except ConfigError as error:
        tracker.note(f"no picture: {error}")
