"""The run directory: made at the start of a run; the policy is written into it at the end. Rank 0 alone writes."""

import shutil
from pathlib import Path

from minicache.disk import folder_written_whole, remove_folder
from minicache.errors import OutputError, RunBusy
from minicache.failures import writing
from minicache.models import load_model, save_model
from minicache.options.train import TrainConfig
from minicache.scoring.scorer import DTYPES
from minicache.trackers import JsonLines, RunName, Tracker, TrackerGroup, open_trackers
from minicache.training import checkpoints
from minicache.training.adapters import write_base_beside
from minicache.training.lock import RunLock
from minicache.training.progress import Outcome
from minicache.training.run_directory import RECORD, RunRecord, write_record
from minicache.training.shards import whole_weights
from minicache.training.state import Run


def open_run(run: Run, record: RunRecord, resume_at: int | None, lock: RunLock, tracker: Tracker) -> TrackerGroup:
    """Make the run directory with run.json; returns its trackers: the given one, metrics.jsonl and the tracking libraries.

    Raises:
        OutputError: it cannot be written, or the disk has no room for the model and the checkpoints.
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
            _require_as_before(out, resume_at)
        if resume_at is None:
            write_record(out, record)
        write_base_beside(run.scorer.model, config, run.cache.tokenizer_dir, tracker)
        return TrackerGroup(tracker, JsonLines(out / "metrics.jsonl", resume_at), *libraries)


def _require_as_before(out: Path, resume_at: int | None) -> None:
    """Raises RunBusy: another process has made a run there, and ended, since this one looked."""
    if resume_at is None and (out / RECORD).exists():
        raise RunBusy(
            f"{out}: another process has begun a run there meanwhile; go on with it by --resume, or name another --out"
        )


def _require_room(run: Run, record: RunRecord, made: bool) -> None:
    """Raises OutputError: the disk has no room for the model and the checkpoints. A directory that was just made is removed."""
    config, out = run.config, run.config.out
    trained = sum(parameter.numel() for parameter in run.scorer.model.parameters() if parameter.requires_grad)
    kept = config.keep_last + 2 if config.save_every and config.save_every < run.steps else 0
    needed = trained * (DTYPES[save_dtype(config, record)].itemsize + 12 * (kept + bool(run.held_out)))
    if getattr(run.scorer.model, "base_beside", None):
        needed += 4 * sum(parameter.numel() for parameter in run.scorer.model.parameters())
    free = shutil.disk_usage(out).free
    if free < needed:
        if made:
            out.rmdir()
        raise OutputError(
            f"{out}: the policy{' and its checkpoints' if kept else ''} will take {needed / 1e6:,.1f} MB, the disk has "
            f"{free / 1e6:,.1f} MB left"
        )


def save_dtype(config: TrainConfig, record: RunRecord) -> str:
    """The precision to save the policy in; "auto" means that of the model it started from."""
    return record.stored_dtype if config.save_dtype == "auto" else config.save_dtype


def save_policy(run: Run, outcome: Outcome, dtype: str) -> None:
    """Write the policy, or the best of its checkpoints, in this precision; adapters stay float32. All processes call it."""
    is_last = outcome.model_step == outcome.progress.step
    weights = whole_weights(run.scorer.model) if is_last and run.scorer.lockstep else None
    if not run.world.is_main:
        return
    best = None if is_last else checkpoints.place(run.config.out, outcome.model_step) / "model"
    place = run.config.out / "model"
    _remove_earlier(place)
    if best and run.config.lora.wanted:
        with folder_written_whole(place) as draft:
            shutil.copytree(best, draft, dirs_exist_ok=True)
        return
    model = load_model(str(best), run.config.trust_remote_code).model if best else run.scorer.model
    if not run.config.lora.wanted:
        model = model.to(DTYPES[dtype])
        weights = weights and {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    save_model(model, run.cache.tokenizer_dir, place, weights)


def _remove_earlier(place: Path) -> None:
    """Remove the model of a call that was killed before it recorded the outcome, and the draft of one of version 0.1.0."""
    with writing(place):
        remove_folder(place)
    shutil.rmtree(place.with_name(".model.saving"), ignore_errors=True)
