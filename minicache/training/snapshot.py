"""The content of a checkpoint: collected from a training under way, and restored into a new one."""

from dataclasses import asdict
from io import BytesIO
from typing import Any

import torch

from minicache.errors import fits
from minicache.models import save_model
from minicache.options.catalog import WEIGHTS
from minicache.processes.world import World
from minicache.scoring.memory import TO_TRAIN
from minicache.training import checkpoints
from minicache.training.metrics import Means
from minicache.training.optim import load_state, make_optimizer
from minicache.training.pool import digest_of
from minicache.training.progress import Progress
from minicache.training.shards import optimizer_tensors, set_optimizer_tensors, trainable, whole_weights
from minicache.training.state import Run, Training


def begin(run: Run, resumed: dict[str, Any] | None) -> Training:
    """The training state before the first step, or after the checkpoint `resumed`.

    Raises:
        OutputError: the checkpoint cannot be read.
    """
    config, device = run.config, run.world.device
    decay = (config.weight_decay, config.weights, config.decay_norms)
    optimizer = make_optimizer(run.scorer.model, config.optimizer, config.lr, *decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    means, progress = Means(device), Progress()
    if resumed:
        progress = checkpoints.progress_of(resumed)
        with fits("the optimizer's state", TO_TRAIN):
            _restore_optimizer(run, optimizer, progress.step, resumed)
        try:
            _restore(scaler, means, resumed, run.world)
        except (RuntimeError, KeyError, TypeError) as error:
            raise checkpoints.unreadable(checkpoints.place(config.out, progress.step), error) from error
    # reading may have taken some longer than others; from here on they meet in every step
    run.world.barrier()
    return Training(
        optimizer=optimizer,
        scaler=scaler,
        means=means,
        progress=progress,
        forward=trainable(run.scorer, run.world),
        saver=checkpoints.Saver(config.out, run.world, config.async_save),
    )


def _restore_optimizer(run: Run, optimizer: torch.optim.Optimizer, step: int, state: dict[str, Any]) -> None:
    """Load the optimizer's state from the checkpoint of a step. Raises OutputError: it cannot be read."""
    if state["optimizer"]:
        try:
            load_state(optimizer, state["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise checkpoints.unreadable(checkpoints.place(run.config.out, step), error) from error
    elif step:
        tensors = optimizer_tensors(run.scorer, optimizer)
        checkpoints.load_optimizer(run.config.out, step, tensors, run.world)
        set_optimizer_tensors(run.scorer, optimizer, tensors)


def _restore(scaler: torch.amp.GradScaler, means: Means, state: dict[str, Any], world: World) -> None:
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    # The saved sums are over all processes, so one of them takes them.
    if world.is_main:
        means.load(state["means"])


def save(run: Run, training: Training) -> None:
    """Save a checkpoint now; remove older ones beyond --keep-last, except for the best.

    Raises:
        OutputError: it cannot be written. FullMemory: the copies that are written do not fit in memory.
    """
    with run.world.watch.saving(), fits("a checkpoint", "training without --async-save, or with --parallel ddp"):
        _save(run, training)


def _save(run: Run, training: Training) -> None:
    progress, config = training.progress, run.config
    sums = run.world.sum(training.means.sums.clone())
    progress.saved = progress.step
    by_name = WEIGHTS[config.weights][config.optimizer].by_name
    state = {
        "optimizer": None if by_name else _kept(training.optimizer.state_dict(), config.async_save),
        "scaler": training.scaler.state_dict(),
        "progress": asdict(progress),
        "means": sums.cpu(),
        "rng": torch.get_rng_state(),
        **pairs_of(run),
    }
    model, tokenizer = run.scorer.model, run.cache.tokenizer_dir
    weights = whole_weights(model) if run.scorer.lockstep or config.async_save else None
    tensors = optimizer_tensors(run.scorer, training.optimizer) if by_name and progress.step else {}
    best = () if progress.best_step is None else (progress.best_step,)
    training.saver.save(
        progress.step,
        state,
        tensors,
        lambda place: save_model(model, tokenizer, place, weights),
        lambda steps: (*steps[-config.keep_last :], *best),
    )


def _kept(state: dict[str, Any], copied: bool) -> dict[str, Any]:
    """An optimizer's state, as a copy in the CPU's memory where training goes on while it is written."""
    if not copied:
        return state
    # not all kinds of tensors can be cloned, but all can be saved
    with BytesIO() as file:
        torch.save(state, file)
        file.seek(0)
        made: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return made


def pairs_of(run: Run) -> dict[str, Any]:
    """What identifies the pairs that a run is trained and validated on; a resumed run must find the same."""
    return {
        "cache": run.cache.identity.digest,
        "pairs": len(run.training),
        "training": digest_of(run.training, run.cached.table),
        "held_out": run.held_out and run.held_out.digest,
    }
