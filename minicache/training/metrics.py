"""PairScores -> named means over pairs, summed on the device and reduced over processes once per log line."""

import torch

from minicache.processes.world import World
from minicache.scoring.scorer import PairScores
from minicache.training.losses import Logps

NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "rewards/accuracy",
    "logps/chosen",
    "logps/rejected",
    "accuracy/policy",
    "accuracy/reference",
    "kl",
    "entropy",
    "tokens/chosen",
    "tokens/rejected",
    "aux_loss",
)


class Means:
    """Running sums of every metric over the pairs since the last `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=device)  # ..., pairs

    def add(self, losses: torch.Tensor, logps: Logps, beta: float, scores: PairScores) -> None:
        """losses: (B,). logps: as the loss saw them. scores: of the same pairs, with their distribution."""
        with torch.no_grad():
            self.sums[:-1] += pair_metrics(losses, logps, beta, scores).sum(1)
        self.sums[-1] += len(losses)

    def reduce(self, world: World) -> dict[str, float]:
        """The means over the pairs of all processes; the sums start again at zero. A dense model has no aux_loss."""
        sums = world.sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        means = {name: total / max(1, sums[-1]) for name, total in zip(NAMES, sums[:-1], strict=True)}
        if not means["aux_loss"]:
            del means["aux_loss"]
        return means


def pair_metrics(losses: torch.Tensor, logps: Logps, beta: float, scores: PairScores) -> torch.Tensor:
    """(len(NAMES), B) float64.

    rewards/accuracy: share of pairs whose implicit reward margin is above 0 (at step 0 there is none: 0).
    accuracy/policy, accuracy/reference: share in which the model itself gives chosen the higher logprob.
    kl: mean over both sides of exp(-d) - 1 + d, where d is the log ratio per counted token; the k3 estimator of
    http://joschu.net/blog/kl-approx.html. The tokens are from the data and not sampled from the policy. So it
    measures how far the policy has moved on these answers, in nats per token, and is not an unbiased KL.
    entropy: of the policy's next-token distribution at the counted tokens, mean over both sides, nats.
    tokens/chosen, tokens/rejected: counted tokens per pair.
    aux_loss: a mixture of experts' load-balancing loss; 0 for a dense model.
    """
    policy, reference = logps.policy, logps.reference
    rewards = beta * logps.ratios
    margin = rewards[:, 0] - rewards[:, 1]
    per_token = logps.per_token(logps.ratios)
    kl = (torch.expm1(-per_token) + per_token).mean(1)
    assert scores.entropy is not None
    rows = [
        losses,
        rewards[:, 0],
        rewards[:, 1],
        margin,
        margin > 0,
        policy[:, 0],
        policy[:, 1],
        policy[:, 0] > policy[:, 1],
        reference[:, 0] > reference[:, 1],
        kl,
        scores.entropy.mean(1),
        scores.token_count[:, 0],
        scores.token_count[:, 1],
        torch.zeros_like(losses) if scores.balance is None else scores.balance,
    ]
    return torch.stack([row.double() for row in rows])
