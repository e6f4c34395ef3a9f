"""Preference losses: pure functions of what policy and reference think of a pair. LOSSES names them."""

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from minicache.errors import ConfigError

Loss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def log_ratios(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log pi(y|x) - log pi_ref(y|x) of both sides, (B, 2), nats; beta times it is DPO's implicit reward (eq. 5)."""
    return policy - reference


def sigmoid(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta * ((chosen ratio) - (rejected ratio))): ln 2 where policy and reference agree.

    policy, reference: (B, 2) float32 logprobs (sums or means) of chosen and rejected. Returns (B,).
    Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7.
    """
    ratios = log_ratios(policy, reference)
    return -logsigmoid(beta * (ratios[:, 0] - ratios[:, 1]))


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid}


def find_loss(name: str) -> Loss:
    """Raises ConfigError, with the names there are, if `name` is none."""
    if name not in LOSSES:
        raise ConfigError(f"--loss: expected one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
