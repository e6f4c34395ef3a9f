"""Named means of metrics over pairs: summed on the device, reduced over the processes once per log line."""

import torch

from minicache.processes.devices import CPU, has_float64, widest
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
    """Running sums of every metric over the pairs since the last `reduce`; of the entropy over those that were scored with it."""

    def __init__(self, device: torch.device) -> None:
        # The last two entries count the pairs, and those with an entropy.
        self._sums = torch.zeros(len(NAMES) + 2, dtype=torch.float64, device=device if has_float64(device) else CPU)
        # Metrics on a device without float64: fetched together, because each time the CPU would wait for the device.
        self._waiting: list[torch.Tensor] = []

    @property
    def sums(self) -> torch.Tensor:
        """(len(NAMES) + 2,) float64: the sums and the two counts; on the CPU where the device has no float64."""
        if self._waiting:
            self._sums[:-2] += torch.cat(self._waiting, 1).cpu().double().sum(1)
            self._waiting = []
        return self._sums

    def add(self, losses: torch.Tensor, logps: Logps, beta: float, scores: PairScores) -> None:
        """Add the metrics of B pairs. losses: (B,). logps: as the loss was given them."""
        with torch.no_grad():
            found = pair_metrics(losses, logps, beta, scores)
        if found.dtype == torch.float64:
            self._sums[:-2] += found.sum(1)
        else:
            self._waiting.append(found)
        self._sums[-2] += len(losses)
        self._sums[-1] += 0 if scores.entropy is None else len(losses)

    def load(self, sums: torch.Tensor) -> None:
        """Go on from the sums of a checkpoint. In those of 0.1.0 every pair has an entropy."""
        self.sums.copy_(torch.cat([sums, sums[-1:]]) if len(sums) == len(NAMES) + 1 else sums)

    def reduce(self, world: World, patient: bool = False) -> dict[str, float]:
        """The means over the pairs of all processes; resets the sums. A dense model has no aux_loss. patient: see `World.sum`."""
        *sums, pairs, with_entropy = world.sum(self.sums, patient).tolist()
        self._sums = torch.zeros_like(self._sums)
        counts = {"entropy": with_entropy}
        means = {name: total / max(1, counts.get(name, pairs)) for name, total in zip(NAMES, sums, strict=True)}
        if not means["aux_loss"]:
            del means["aux_loss"]
        return means


def pair_metrics(losses: torch.Tensor, logps: Logps, beta: float, scores: PairScores) -> torch.Tensor:
    """(len(NAMES), B) float64, or float32 on a device without it: the metrics of each pair in the order of NAMES.

    rewards/accuracy: whether the implicit reward margin is above 0 (false at step 0, where all margins are 0).
    accuracy/policy, accuracy/reference: whether the model itself gives chosen the higher logprob.
    kl: mean over both sides of exp(-d) - 1 + d, where d is the log ratio per counted token; the k3 estimator of
    http://joschu.net/blog/kl-approx.html. The tokens are from the data and not sampled from the policy. So it
    measures how far the policy has moved on these answers, in nats per token, and is not an unbiased KL.
    entropy: of the policy's next-token distribution at the counted tokens, mean over both sides, nats; 0 if it was not computed.
    tokens/chosen, tokens/rejected: counted tokens.
    aux_loss: load-balancing loss of a mixture of experts; 0 for a dense model.
    """
    policy, reference = logps.policy, logps.reference
    rewards = beta * logps.ratios
    margin = rewards[:, 0] - rewards[:, 1]
    per_token = logps.per_token(logps.ratios)
    kl = (torch.expm1(-per_token) + per_token).mean(1)
    zeros = torch.zeros_like(losses)
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
        zeros if scores.entropy is None else scores.entropy.mean(1),
        scores.token_count[:, 0],
        scores.token_count[:, 1],
        zeros if scores.balance is None else scores.balance,
    ]
    return torch.stack([row.to(widest(losses.device)) for row in rows])
