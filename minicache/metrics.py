"""PairScores -> named means over pairs, summed on the device and reduced over processes once a log line."""

import torch

from minicache.distributed import World
from minicache.losses import Logps

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
)


class Means:
    """Running sums of every metric over the pairs seen since the last `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(NAMES) + 2, dtype=torch.float64, device=device)  # ..., pairs, tokens

    def add(self, losses: torch.Tensor, logps: Logps, beta: float) -> None:
        """losses: (B,). logps: as the loss saw them."""
        with torch.no_grad():
            self.sums[:-2] += pair_metrics(losses, logps, beta).sum(1)
        self.sums[-2] += len(losses)

    def add_tokens(self, tokens: int) -> None:
        self.sums[-1] += tokens

    def reduce(self, world: World) -> tuple[dict[str, float], int]:
        """Means over all processes' pairs, and the tokens they read; starts again from nothing."""
        sums = world.sum(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        means = {name: total / max(1, sums[-2]) for name, total in zip(NAMES, sums[:-2], strict=True)}
        return means, int(sums[-1])


def pair_metrics(losses: torch.Tensor, logps: Logps, beta: float) -> torch.Tensor:
    """(len(NAMES), B) float64.

    rewards/accuracy: share of pairs whose implicit reward margin is above 0 (at step 0 there is none: 0).
    accuracy/policy, accuracy/reference: share in which the model itself gives chosen the higher logprob.
    kl: mean over both sides of exp(-d) - 1 + d, where d is the log ratio a counted token; the k3 estimator of
    http://joschu.net/blog/kl-approx.html. The tokens are the data's and not the policy's samples, so it says how far the policy has
    moved on these answers, nats a token, and is no unbiased KL.
    """
    policy, reference = logps.policy, logps.reference
    rewards = beta * logps.ratios
    margin = rewards[:, 0] - rewards[:, 1]
    per_token = logps.per_token(logps.ratios)
    kl = (torch.expm1(-per_token) + per_token).mean(1)
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
    ]
    return torch.stack([row.double() for row in rows])
