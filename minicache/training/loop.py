"""The optimizer steps of a run: accumulation, validation, checkpoints, and what ends it before its time."""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from minicache.errors import ModelError, RunDiverged
from minicache.models import save_model
from minicache.options.catalog import OPTIMIZERS
from minicache.processes.signals import StopFlag
from minicache.scoring.batching import ahead
from minicache.trackers import Silent, Tracker
from minicache.training import checkpoints
from minicache.training.metrics import Means
from minicache.training.optim import make_optimizer
from minicache.training.order import pairs_in
from minicache.training.pool import digest_of
from minicache.training.shards import optimizer_tensors, set_optimizer_tensors, trainable, whole_weights
from minicache.training.speed import memory_gb, peak_flops
from minicache.training.state import Progress, Run, Training
from minicache.training.step import Share, beta_of, count_step, plan, take_step
from minicache.training.validation import evaluate_policy

VALIDATIONS = 10  # in a run, unless --eval-every says otherwise


@dataclass(frozen=True)
class Outcome:
    """How a run ended. model_step: optimizer steps behind the model to save. stopped: why before its time, if so."""

    progress: Progress
    stopped: str | None

    @property
    def model_step(self) -> int:
        return self.progress.step if self.progress.best_step is None else self.progress.best_step


def optimize(run: Run, resumed: dict[str, Any] | None, tracker: Tracker) -> Outcome:
    """All optimizer steps, from the first or from where the checkpoint `resumed` was made.

    Raises:
        RunDiverged: the loss is no longer finite. ModelError: a step does not fit in memory.
        KeyboardInterrupt: on a signal, after a checkpoint was saved.
    """
    training = _begin(run, resumed)
    config, progress, stopped = run.config, training.progress, None
    tracker.begin("training", pairs_in(run.steps, len(run.training), config.batch_size))
    tracker.advance(pairs_in(progress.step, len(run.training), config.batch_size), 0)
    with StopFlag() as stop:
        for mine in ahead(plan(run, progress.step)):
            stopped = _between_steps(run, training)
            if stopped:
                break
            started = time.monotonic()
            norm = _step_that_fits(run, training, mine)
            tokens = count_step(run, training, mine.indices, time.monotonic() - started)
            tracker.advance(len(mine.indices), tokens)
            stopped = _log(run, training, norm, tracker)
            if (run.world.size == 1 or _is_logged(run, progress.step - 1)) and run.world.any(bool(stop)):
                _save(run, training)
                training.saver.wait()
                raise KeyboardInterrupt(
                    f"the state after {progress.step} steps is saved; the same command with --resume goes on"
                )
            if stopped:
                break
    if run.held_out and progress.validated != progress.step:
        _validate(run, training)
    _tell_pending(training, progress.step, tracker)
    training.saver.wait()
    run.world.barrier()
    return Outcome(progress, stopped)


def _begin(run: Run, resumed: dict[str, Any] | None) -> Training:
    config, device = run.config, run.world.device
    optimizer = make_optimizer(run.scorer.model, config.optimizer, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    means, progress = Means(device), Progress()
    if resumed:
        step = resumed["progress"]["step"]
        if resumed["optimizer"]:
            optimizer.load_state_dict(resumed["optimizer"])
        elif step:
            tensors = optimizer_tensors(run.scorer, optimizer)
            checkpoints.load_optimizer(config.out, step, tensors, run.world)
            set_optimizer_tensors(run.scorer, optimizer, tensors)
        scaler.load_state_dict(resumed["scaler"])
        progress = Progress(**resumed["progress"])
        torch.set_rng_state(resumed["rng"])
        if run.world.is_main:  # sums over all processes
            means.sums.copy_(resumed["means"])
    saver = checkpoints.Saver(config.out, run.world, config.async_save)
    return Training(optimizer, scaler, means, progress, trainable(run.scorer, run.world), saver)


def _step_that_fits(run: Run, training: Training, mine: Share) -> torch.Tensor:
    try:
        return take_step(run, training, mine)
    except torch.OutOfMemoryError as error:
        kept = checkpoints.steps(run.config.out)
        after = f"; --resume goes on from step {kept[-1]}" if kept else ""
        raise ModelError(
            f"step {training.progress.step}: {run.budget:,} token slots at once do not fit in memory; try "
            f"--tokens-per-micro-batch {max(1, run.budget // 2)} or --activation-checkpointing{after}"
        ) from error


def _between_steps(run: Run, training: Training) -> str | None:
    """Validation and checkpoint where one is due; a reason to end the run, or None."""
    progress, config = training.progress, run.config
    step = progress.step
    if run.held_out and progress.validated != step and step % _eval_every(run) == 0:
        _validate(run, training)
    due = step > 0 and config.save_every and step % config.save_every == 0
    if due and progress.saved != step:
        _save(run, training)
    patience = config.validation.patience  # asked in every step, so that a resumed run ends where the other did
    if patience and progress.waited >= patience:
        return f"no lower validation loss in {progress.waited} validations"
    return None


def _tell_pending(training: Training, step: int, tracker: Tracker) -> None:
    """Validated metrics that no log line of training took along: one line a step is what trackers know to resume."""
    if training.progress.pending:
        tracker.log(step, training.progress.pending)
        training.progress.pending = {}


def _eval_every(run: Run) -> int:
    return run.config.validation.eval_every or max(1, -(-run.steps // VALIDATIONS))


def _validate(run: Run, training: Training) -> None:
    """Score the held-out pairs; keep a checkpoint of the best."""
    assert run.held_out
    progress, options = training.progress, run.config.validation
    objective = replace(run.objective, beta=beta_of(run, min(progress.step, run.steps - 1)))
    metrics = evaluate_policy(run.scorer, run.held_out, objective, run.budget, run.world, Silent())
    progress.validated, loss = progress.step, metrics["loss"]
    progress.pending = {f"eval/{name}": value for name, value in metrics.items()}
    progress.waited += 1
    if progress.anchor is None or loss < progress.anchor - options.min_gain:
        progress.anchor, progress.waited = loss, 0
    if progress.best is None or loss < progress.best:
        progress.best, progress.best_step, progress.validation = loss, progress.step, metrics
        _save(run, training)


def _save(run: Run, training: Training) -> None:
    """A checkpoint of this moment; older ones beyond --keep-last go, the best stays."""
    progress, config = training.progress, run.config
    sums = run.world.sum(training.means.sums.clone())
    progress.saved = progress.step
    by_name = OPTIMIZERS[config.optimizer].by_name  # the others' state has a form of their own
    state = {
        "optimizer": None if by_name else training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
        "progress": asdict(progress),
        "means": sums.cpu(),
        "rng": torch.get_rng_state(),
        "cache": run.cache.identity.digest,
        "pairs": len(run.training),
        "training": digest_of(run.training, run.cached.table),
        "held_out": run.held_out and run.held_out.digest,
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


# --- log lines ---


def _is_logged(run: Run, step: int) -> bool:
    return step % run.config.log_every == 0 or step == run.steps - 1


def _log(run: Run, training: Training, norm: torch.Tensor, tracker: Tracker) -> str | None:
    """The line of the step just done, if it has one: means over the steps since the line before.

    Returns:
        a reason to end the run, or None.
    """
    progress, config, step = training.progress, run.config, training.progress.step - 1
    if not _is_logged(run, step):
        _tell_pending(training, step, tracker)
        return None
    started = time.monotonic()
    metrics = training.means.reduce(run.world)  # waits for the device
    progress.seconds += time.monotonic() - started
    metrics |= {
        "lr": training.optimizer.param_groups[0]["lr"],
        "beta": beta_of(run, step),
        "grad_norm": norm.item(),
        "epoch": progress.step / -(-len(run.training) // config.batch_size),
        "tokens": progress.total_tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        "memory_gb": memory_gb(run.world.device),
    }
    if peak := peak_flops(run.world.device, config.dtype):
        metrics["mfu"] = progress.flops / progress.seconds / (peak * run.world.size)
    if training.scaler.is_enabled():
        metrics["grad_scale"] = training.scaler.get_scale()
    progress.seconds, progress.tokens, progress.flops = 0.0, 0, 0.0
    _check_finite(step, metrics, training.scaler)
    progress.first, progress.last = progress.first or metrics, metrics
    progress.last_step = step
    tracker.log(step, metrics | progress.pending)
    progress.pending = {}
    return _check_kl(run, training, metrics["kl"], tracker)


def _check_finite(step: int, metrics: dict[str, float], scaler: torch.amp.GradScaler) -> None:
    """A gradient that overflowed in float16 was skipped, and the next is scaled down: no reason to end, unless that goes on."""
    if scaler.is_enabled() and not math.isfinite(metrics["grad_norm"]) and metrics["grad_scale"] >= 1:
        del metrics["grad_norm"]
    if not all(math.isfinite(metrics.get(name, 0.0)) for name in ("loss", "grad_norm")):
        raise RunDiverged(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics.get('grad_norm', math.nan)}: the run has diverged; "
            "expected finite numbers. Try a lower --lr or --beta; no model was saved"
        )


def _check_kl(run: Run, training: Training, kl: float, tracker: Tracker) -> str | None:
    most = run.config.max_kl
    if most is None or kl <= most:
        return None
    text = f"the policy has moved {kl:.3g} nats a token from the reference, more than --max-kl {most:g}"
    if run.config.on_max_kl == "stop":
        return text
    if not training.progress.warned:
        training.progress.warned = True
        tracker.note(f"step {training.progress.step - 1}: {text}")
    return None
