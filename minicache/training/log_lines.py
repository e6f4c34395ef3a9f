"""The line of a logged step: means since the previous line, their cost, and whether they end the run."""

import math
import time

import torch

from minicache.errors import RunDiverged
from minicache.reports.figures import MOVED_TOO_FAR
from minicache.trackers import Tracker
from minicache.training.speed import memory_gb, peak_flops
from minicache.training.state import Run, Training
from minicache.training.step import beta_of, is_logged, learning_rate_of


def log_step(run: Run, training: Training, norm: torch.Tensor, tracker: Tracker) -> str | None:
    """Write the line of the last step, if it has one; returns a reason to end the run, or None.

    norm: of the step's gradient.

    Raises:
        RunDiverged: loss or gradient are no longer finite.
    """
    progress, step = training.progress, training.progress.step - 1
    if not is_logged(run, step):
        log_pending(training, step, tracker)
        return None
    metrics = _metrics(run, training, norm)
    _check_finite(step, metrics, training.scaler)
    progress.first, progress.last = progress.first or metrics, metrics
    progress.last_step = step
    tracker.log(step, metrics | progress.pending)
    progress.pending = {}
    return _check_kl(run, training, metrics.get("kl_tokens", metrics["kl"]), tracker)


def log_pending(training: Training, step: int, tracker: Tracker) -> None:
    """Write validation metrics that no line of training has carried yet.

    Usually they wait for the next line of training: a resumed tracker expects one line per step.
    """
    if training.progress.pending:
        tracker.log(step, training.progress.pending)
        training.progress.pending = {}


def _metrics(run: Run, training: Training, norm: torch.Tensor) -> dict[str, float]:
    """The metrics of the steps since the previous line. Their sums start again at zero."""
    progress, config, step = training.progress, run.config, training.progress.step - 1
    started = time.monotonic()
    # The reduction waits for the device, so it counts as time of the steps. All processes get the same numbers, the gradient's norm
    # too, and decide by them alike.
    metrics = training.means.reduce(run.world)
    progress.seconds += time.monotonic() - started
    metrics |= {
        "lr": learning_rate_of(run, step),
        "beta": beta_of(run, step),
        "grad_norm": run.world.sum(norm.double().reshape(1)).item() / run.world.size,
        "epoch": progress.step / -(-len(run.training) // config.batch_size),
        "tokens": progress.total_tokens,
        "tokens_per_second": progress.tokens / progress.seconds,
        "memory_gb": memory_gb(run.world.device),
    }
    if peak := peak_flops(run.world.device, config.dtype):
        # FLOPs are those of all processes, the peak is that of one device.
        metrics["mfu"] = progress.flops / progress.seconds / (peak * run.world.size)
    if training.scaler.is_enabled():
        metrics["grad_scale"] = training.scaler.get_scale()
    progress.seconds, progress.tokens, progress.flops = 0.0, 0, 0.0
    return metrics


def _check_finite(step: int, metrics: dict[str, float], scaler: torch.amp.GradScaler) -> None:
    """Raises RunDiverged: loss or gradient are not finite.

    A gradient that overflowed in float16 is no failure while the scale can still be lowered: that step was skipped.
    """
    if scaler.is_enabled() and not math.isfinite(metrics["grad_norm"]) and metrics["grad_scale"] >= 1:
        del metrics["grad_norm"]
    if not all(math.isfinite(metrics.get(name, 0.0)) for name in ("loss", "grad_norm")):
        raise RunDiverged(
            f"step {step}: loss {metrics['loss']}, gradient norm {metrics.get('grad_norm', math.nan)}: the run has diverged; "
            "expected finite numbers. Try a lower --lr or --beta; no model was saved"
        )


def _check_kl(run: Run, training: Training, kl: float, tracker: Tracker) -> str | None:
    """Compare the KL with --max-kl; returns a reason to end the run, or None after at most a warning."""
    most = run.config.max_kl
    if most is None or kl <= most:
        return None
    text = MOVED_TOO_FAR.format(kl=format(kl, ".3g"), most=format(most, "g"))
    if run.config.on_max_kl == "stop":
        return text
    if not training.progress.warned:
        training.progress.warned = True
        tracker.note(f"step {training.progress.step - 1}: {text}")
    return None
