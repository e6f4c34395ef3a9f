"""The optimizer steps of a run, with validation and checkpoints between them, and the reasons to end early."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from minicache.errors import FullMemory, in_words, is_full_memory
from minicache.processes.signals import StopFlag
from minicache.reports.figures import NO_LOWER_LOSS
from minicache.scoring.batching import ahead
from minicache.trackers import Silent, Tracker
from minicache.training import checkpoints
from minicache.training.log_lines import log_pending, log_step
from minicache.training.order import pairs_in
from minicache.training.progress import Outcome
from minicache.training.run_directory import final_beta
from minicache.training.snapshot import begin, save
from minicache.training.state import Run, Training
from minicache.training.step import Share, count_step, is_logged, plan, take_step
from minicache.training.validation import Stopped, evaluate_policy

log = logging.getLogger(__name__)

# Validations of a run without --eval-every.
VALIDATIONS = 10


def optimize(run: Run, resumed: dict[str, Any] | None, tracker: Tracker) -> Outcome:
    """Take all optimizer steps, from the first or from the checkpoint `resumed`; returns how the run ended.

    Raises:
        RunDiverged: the loss is no longer finite. FullMemory: a step does not fit in memory.
        KeyboardInterrupt: on a signal, after a checkpoint was saved.
    """
    training = begin(run, resumed)
    progress = training.progress
    log.debug("%d of %d steps are done", progress.step, run.steps)
    tracker.begin("training", pairs_in(run.steps, len(run.training), run.config.batch_size))
    tracker.advance(pairs_in(progress.step, len(run.training), run.config.batch_size), 0)
    with StopFlag() as stop:
        stopped = _take_steps(run, training, stop, tracker)
        if run.held_out and progress.validated != progress.step:
            _validate(run, training, stop)
        with run.world.watch.saving():
            run.world.each(training.saver.wait)
        # all steps are done, but what they made is not saved before the caller does so
        _save_if_asked_to_stop(run, training, stop)
        # after it: the run that goes on keeps no line of this step
        log_pending(training, progress.step, tracker)
    return Outcome(model_step=progress.model_step, stopped=stopped, progress=progress)


def _take_steps(run: Run, training: Training, stop: StopFlag, tracker: Tracker) -> str | None:
    """Take the remaining steps; returns why they ended early, or None."""
    pace, progress = Pace(run), training.progress
    if progress.stopped:
        return progress.stopped
    for mine in ahead(plan(run, progress.step)):
        if stopped := _between_steps(run, training, stop):
            return stopped
        started = time.monotonic()
        with pace.step(progress.step):
            norm = _step_that_fits(run, training, mine)
            tokens = count_step(run, training, mine.indices, time.monotonic() - started)
            tracker.advance(len(mine.indices), tokens)
            progress.stopped = log_step(run, training, norm, tracker)
        # several processes ask each other at logged steps only: asking costs a message between them
        if run.world.size == 1 or is_logged(run, progress.step - 1):
            _save_if_asked_to_stop(run, training, stop)
        if progress.stopped:
            return progress.stopped
    return None


class Pace:
    """Tells the world's watch what steps take, so that it does not end a run that is merely slow.

    A GPU is waited for in logged steps, so that these take the time of all steps since the last.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.steps, self.seconds = run, 0, 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Mark a step, counted from 0."""
        watch, started = self.run.world.watch, time.monotonic()
        with watch.inside():
            yield
        self.steps += 1
        self.seconds += time.monotonic() - started
        if is_logged(self.run, number):
            watch.learn(self.run.config.log_every * self.seconds / self.steps)
            self.steps, self.seconds = 0, 0.0


def _between_steps(run: Run, training: Training, stop: StopFlag) -> str | None:
    """Validate and save where that is due; returns a reason to end the run, or None. Raises as `_save_if_asked_to_stop`."""
    progress, config = training.progress, run.config
    step = progress.step
    if run.held_out and progress.validated != step and step % _eval_every(run) == 0:
        _validate(run, training, stop)
        _save_if_asked_to_stop(run, training, stop)
    due = step > 0 and config.save_every and step % config.save_every == 0
    if due and progress.saved != step:
        save(run, training)
    # Checked in every step, so that a resumed run ends at the same step as one without interruption.
    patience = config.validation.patience
    if patience and progress.waited >= patience:
        return NO_LOWER_LOSS.format(waited=progress.waited)
    return None


def _step_that_fits(run: Run, training: Training, mine: Share) -> torch.Tensor:
    """As `take_step`. Raises FullMemory: the step does not fit in memory."""
    try:
        return take_step(run, training, mine)
    except Exception as error:
        if not is_full_memory(error) or isinstance(error, FullMemory):
            raise
        kept = checkpoints.steps(run.config.out)
        after = f"; --resume goes on from step {kept[-1]}" if kept else ""
        step = f"step {training.progress.step}, of {run.budget:,} token slots at once,"
        advice = f"--tokens-per-micro-batch {max(1, run.budget // 2)} or --activation-checkpointing{after}"
        full = in_words(error, step, advice)
        assert full
        raise full from error


def _save_if_asked_to_stop(run: Run, training: Training, stop: StopFlag) -> None:
    """Raises KeyboardInterrupt once the state is saved, if any process was asked to stop. All processes call it."""
    step = training.progress.step
    if run.world.any(bool(stop)):
        with run.world.watch.saving():
            if training.progress.saved != step:
                save(run, training)
            training.saver.wait()
            # all leave together: a launcher ends those that stay behind
            run.world.barrier()
        raise KeyboardInterrupt(f"the state after {step} steps is saved; the same command with --resume goes on")


def _eval_every(run: Run) -> int:
    """Steps between two validations."""
    return run.config.validation.eval_every or max(1, -(-run.steps // VALIDATIONS))


def _validate(run: Run, training: Training, stop: StopFlag) -> None:
    """Score the held-out pairs with the beta that the run ends at; save a checkpoint of the best policy.

    Raises:
        KeyboardInterrupt: a process was asked to stop, after a checkpoint was saved. The run that goes on validates again.
    """
    assert run.held_out
    started = time.monotonic()
    progress, options = training.progress, run.config.validation
    objective = replace(run.objective, beta=final_beta(run.objective.beta, run.config.beta_end))
    try:
        found = evaluate_policy(
            run.scorer, run.held_out, objective, run.budget, run.world, Silent(), stop=lambda: bool(stop)
        )
    except Stopped:
        _save_if_asked_to_stop(run, training, stop)
        raise
    metrics, loss = found.metrics, found.metrics["loss"]
    progress.validated = progress.step
    log.debug("validation at step %d: loss %.6g, %.1f s", progress.step, loss, time.monotonic() - started)
    progress.pending = {f"eval/{name}": value for name, value in metrics.items()} | {"eval/beta": objective.beta}
    progress.waited += 1
    if progress.anchor is None or loss < progress.anchor - options.min_gain:
        progress.anchor, progress.waited = loss, 0
    if progress.best is None or loss < progress.best:
        progress.best, progress.best_step, progress.validation = loss, progress.step, metrics
        progress.held_out = found.held_out
        save(run, training)
