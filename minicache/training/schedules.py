"""Learning rate and beta as pure functions of the step. No torch."""

import math

from minicache.options.catalog import SCHEDULES, code_of


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine(progress: float, floor: float) -> float:
    """From 1 to the floor along half a cosine. Source: Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5."""
    return floor + (1 - floor) * _half_cosine(progress)


def linear(progress: float, floor: float) -> float:
    """From 1 to the floor."""
    return 1 - (1 - floor) * progress


def constant(progress: float, floor: float) -> float:
    """1 throughout."""
    return 1.0


def minimind_25(progress: float, floor: float) -> float:
    """MiniMind's train_dpo.py of 2504 and 2510: lr/10 + lr/2 (1 + cos), 1.1 lr at 0; 2510 counts steps from 1, 2504 from 0."""
    return 0.1 + _half_cosine(progress)


def minimind_3(progress: float, floor: float) -> float:
    """MiniMind's train_dpo.py of generation 3: lr (0.1 + 0.45 (1 + cos))."""
    return 0.1 + 0.9 * _half_cosine(progress)


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of the warm-up: `warmup` itself, or below 1 that share of `steps`, rounded up."""
    # 0.07 * 100 is 7.000000000000001
    share = math.ceil(warmup * steps - 1e-9)
    return min(share if warmup < 1 else round(warmup), steps)


def learning_rate(step: int, steps: int, lr: float, schedule: str, warmup: float, floor: float) -> float:
    """The rate of a step (from 0): a linear rise over the warm-up, then the schedule. The first step has a rate above 0.

    warmup: as in `warmup_steps`. floor: share of `lr` that cosine and linear end at.
    """
    rising = warmup_steps(warmup, steps)
    if step < rising:
        return lr * (step + 1) / rising
    entry = SCHEDULES[schedule]
    # MiniMind's later scripts number their steps from 1.
    done = step - rising + entry.counts_from_1
    factor: float = code_of(entry)(done / max(1, steps - rising), floor)
    return lr * factor


def beta_at(step: int, steps: int, beta: float, beta_end: float | None) -> float:
    """The beta of a step (from 0): linear from `beta` at the first step to `beta_end` at the last."""
    if beta_end is None:
        return beta
    return beta + (beta_end - beta) * step / max(1, steps - 1)
