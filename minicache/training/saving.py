"""The run directory: made at the start, the policy written into it at the end. Rank 0 alone."""

import shutil
from pathlib import Path

from minicache.disk import writing
from minicache.errors import OutputError
from minicache.models import load_model, save_model
from minicache.options.train import TrainConfig
from minicache.scoring.scorer import DTYPES
from minicache.trackers import JsonLines, RunName, Tracker, TrackerGroup, open_trackers
from minicache.training import checkpoints
from minicache.training.lock import RunLock
from minicache.training.progress import Outcome
from minicache.training.run_directory import RunRecord, write_record
from minicache.training.shards import whole_weights
from minicache.training.state import Run


def open_run(run: Run, record: RunRecord, resume_at: int | None, lock: RunLock, tracker: Tracker) -> TrackerGroup:
    """Make the run directory with run.json and metrics.jsonl, and open what else is to hear of it.

    Raises:
        OutputError: it cannot be written, or the disk has no room for what the run will leave: better known now than at the end.
        RunBusy: another process has begun a run there. ConfigError: a tracking library is missing.
    """
    out, config = run.config.out, run.config
    libraries = open_trackers(config.tracker, RunName(out, "minicache", out.resolve().name, resume_at), tracker.note)
    with writing(out):
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        _require_room(run, record, made)
        if not lock.is_held:
            lock.require()
        if resume_at is None:
            write_record(out, record)
        return TrackerGroup(tracker, JsonLines(out / "metrics.jsonl", resume_at), *libraries)


def _require_room(run: Run, record: RunRecord, made: bool) -> None:
    """Raises OutputError: the disk is too small for the model and the checkpoints; a directory that was made for them goes."""
    config, out = run.config, run.config.out
    trained = sum(parameter.numel() for parameter in run.scorer.model.parameters() if parameter.requires_grad)
    kept = config.keep_last + 2 if config.save_every and config.save_every < run.steps else 0
    needed = trained * (DTYPES[save_dtype(config, record)].itemsize + 12 * (kept + bool(run.held_out)))
    free = shutil.disk_usage(out).free
    if free < needed:
        if made:
            out.rmdir()
        raise OutputError(
            f"{out}: the policy{' and its checkpoints' if kept else ''} will take {needed / 1e6:,.1f} MB, the disk has "
            f"{free / 1e6:,.1f} MB left"
        )


def save_dtype(config: TrainConfig, record: RunRecord) -> str:
    return record.stored_dtype if config.save_dtype == "auto" else config.save_dtype


def save_policy(run: Run, outcome: Outcome, dtype: str) -> None:
    """The policy, or the best of its checkpoints, in this precision; adapters stay float32. To be called by all processes."""
    is_last = outcome.model_step == outcome.progress.step
    weights = whole_weights(run.scorer.model) if is_last and run.scorer.lockstep else None
    if not run.world.is_main:
        return
    best = None if is_last else checkpoints.place(run.config.out, outcome.model_step) / "model"
    _clear(run.config.out)
    if best and run.config.lora.lora_rank:
        _copy(best, run.config.out)
        return
    model = load_model(str(best), run.config.trust_remote_code).model if best else run.scorer.model
    if not run.config.lora.lora_rank:
        model = model.to(DTYPES[dtype])
        weights = weights and {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    save_model(model, run.cache.tokenizer_dir, run.config.out / "model", weights)


def _clear(out: Path) -> None:
    """Of what a call left that was killed before it could say that the run is finished."""
    with writing(out):
        shutil.rmtree(out / "model", ignore_errors=True)
        shutil.rmtree(_draft(out), ignore_errors=True)


def _copy(model: Path, out: Path) -> None:
    with writing(out):
        shutil.copytree(model, _draft(out))
        _draft(out).replace(out / "model")


def _draft(out: Path) -> Path:
    return out / ".model.saving"
