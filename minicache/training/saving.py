"""The run directory: made at the start, the policy written into it at the end."""

import shutil
from typing import Any

from minicache.disk import writing
from minicache.errors import OutputError
from minicache.models import load_model, save_model
from minicache.options.train import TrainConfig
from minicache.scoring.scorer import DTYPES
from minicache.trackers import JsonLines, RunName, Tracker, TrackerGroup, open_trackers
from minicache.training import checkpoints
from minicache.training.loop import Outcome
from minicache.training.run_directory import write_facts
from minicache.training.shards import whole_weights
from minicache.training.state import Run

# --- the run directory; rank 0 alone ---


def open_run(run: Run, facts: dict[str, Any], resume_at: int | None, tracker: Tracker) -> TrackerGroup:
    """Make the run directory with run.json and metrics.jsonl, and open what else is to hear of it.

    Raises:
        OutputError: it cannot be written, or the disk has no room for what the run will leave: better known now than at the end.
        ConfigError: a tracking library is missing.
    """
    out, config = run.config.out, run.config
    libraries = open_trackers(config.tracker, RunName(out, "minicache", out.resolve().name, resume_at), tracker.note)
    trained = sum(parameter.numel() for parameter in run.scorer.model.parameters() if parameter.requires_grad)
    kept = config.keep_last + 2 if config.save_every and config.save_every < run.steps else 0
    needed = trained * (DTYPES[save_dtype(config, facts)].itemsize + 12 * (kept + bool(run.held_out)))
    with writing(out):
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if free < needed:
            if made:
                out.rmdir()
            raise OutputError(
                f"{out}: the policy{' and its checkpoints' if kept else ''} will take {needed / 1e6:,.1f} MB, the disk has "
                f"{free / 1e6:,.1f} MB left"
            )
        if resume_at is None:
            write_facts(out, facts)
        return TrackerGroup(tracker, JsonLines(out / "metrics.jsonl", resume_at), *libraries)


def save_dtype(config: TrainConfig, facts: dict[str, Any]) -> str:
    return facts["stored_dtype"] if config.save_dtype == "auto" else config.save_dtype


def save_policy(run: Run, outcome: Outcome, dtype: str) -> None:
    """The policy, or the best of its checkpoints, in this precision; adapters stay float32."""
    config, out, model = run.config, run.config.out, run.scorer.model
    best, draft = checkpoints.place(out, outcome.model_step) / "model", out / ".model.saving"
    is_last = outcome.model_step == outcome.progress.step
    weights = whole_weights(model) if is_last and run.scorer.lockstep else None  # all processes take part
    if not run.world.is_main:
        return
    with writing(out):  # of a call that was killed before it could say that the run is finished
        shutil.rmtree(out / "model", ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)
    if config.lora.lora_rank and not is_last:
        with writing(out):
            shutil.copytree(best, draft)
            draft.replace(out / "model")
        return
    model = model if is_last else load_model(str(best), config.trust_remote_code).model
    if not config.lora.lora_rank:
        model = model.to(DTYPES[dtype])
        weights = weights and {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    save_model(model, run.cache.tokenizer_dir, out / "model", weights)
