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
    "kl_tokens",
)
# What follows the sums: how many pairs, how many tokens of those with an entropy, how many pairs with the KL of each token.
COUNTS = 3
OF_TOKENS, OF_SOME_PAIRS = "entropy", "kl_tokens"
# Metrics that checkpoints held before there was "kl_tokens".
BEFORE = NAMES.index("kl_tokens")


def k3(log_ratios: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d of log ratios d = log pi - log pi_ref. Source: joschu.net/blog/kl-approx.html, the estimator k3."""
    return torch.expm1(-log_ratios) + log_ratios


class Means:
    """Running sums of every metric over the pairs since the last `reduce`; of the entropy over the tokens scored with it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(
            len(NAMES) + COUNTS, dtype=torch.float64, device=device if has_float64(device) else CPU
        )
        # Metrics on a device without float64: fetched together, because each time the CPU would wait for the device.
        self._waiting: list[torch.Tensor] = []

    @property
    def sums(self) -> torch.Tensor:
        """(len(NAMES) + COUNTS,) float64: the sums and the counts; on the CPU where the device has no float64."""
        if self._waiting:
            self._sums += torch.cat(self._waiting, 1).cpu().double().sum(1)
            self._waiting = []
        return self._sums

    def add(self, losses: torch.Tensor, logps: Logps, beta: float, scores: PairScores) -> None:
        """Add the metrics of B pairs. losses: (B,). logps: as the loss was given them."""
        with torch.no_grad():
            found = pair_metrics(losses, logps, beta, scores)
        if found.dtype == torch.float64:
            self._sums += found.sum(1)
        else:
            self._waiting.append(found)

    def load(self, sums: torch.Tensor) -> None:
        """Go on from the sums of a checkpoint. Earlier versions averaged the entropy over pairs: it begins anew."""
        if len(sums) in (BEFORE + 1, BEFORE + 2):
            before, pairs = sums[:BEFORE].clone(), sums[BEFORE]
            before[NAMES.index(OF_TOKENS)] = 0
            sums = torch.cat([before, sums.new_zeros(len(NAMES) - BEFORE), pairs[None], sums.new_zeros(COUNTS - 1)])
        self.sums.copy_(sums)

    def reduce(self, world: World, patient: bool = False) -> dict[str, float]:
        """The means over the pairs of all processes; resets the sums. patient: see `World.sum`.

        A dense model has no aux_loss, and there is no kl_tokens without each token's logprob by the reference.
        """
        *sums, pairs, tokens, known = world.sum(self.sums, patient).tolist()
        self._sums = torch.zeros_like(self._sums)
        counts = {OF_TOKENS: tokens, OF_SOME_PAIRS: known}
        means = {name: total / max(1, counts.get(name, pairs)) for name, total in zip(NAMES, sums, strict=True)}
        if not means["aux_loss"]:
            del means["aux_loss"]
        if not known:
            del means[OF_SOME_PAIRS]
        return means


def pair_metrics(losses: torch.Tensor, logps: Logps, beta: float, scores: PairScores) -> torch.Tensor:
    """(len(NAMES) + COUNTS, B) float64, or float32 on a device without it: what each pair adds to the sums and counts.

    rewards/accuracy: whether the implicit reward margin is above 0 (false at step 0, where all margins are 0).
    accuracy/policy, accuracy/reference: whether the model itself gives chosen the higher logprob.
    kl_tokens: `k3` of the log ratio of each counted token, mean over a side's tokens, then over both sides, nats per token.
    kl: `k3` of a side's mean log ratio, mean over both sides. k3 is convex, so it is at most kl_tokens, and often far less.
        The tokens are from the data and not sampled from the policy: both measure how far the policy has moved on these
        answers, and neither is an unbiased KL.
    entropy: of the policy's next-token distribution, mean over the counted tokens of all pairs, nats; 0 if it was not computed.
    tokens/chosen, tokens/rejected: counted tokens.
    aux_loss: load-balancing loss of a mixture of experts; 0 for a dense model.
    """
    policy, reference = logps.policy, logps.reference
    rewards = beta * logps.ratios
    margin = rewards[:, 0] - rewards[:, 1]
    kl = k3(logps.per_token(logps.ratios)).mean(1)
    zeros, ones, counts = torch.zeros_like(losses), torch.ones_like(losses), scores.token_count
    entropy, token_kl = scores.entropy, logps.token_kl
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
        zeros if entropy is None else (entropy * counts).sum(1),
        counts[:, 0],
        counts[:, 1],
        zeros if scores.balance is None else scores.balance,
        zeros if token_kl is None else token_kl.mean(1),
        ones,
        zeros if entropy is None else counts.sum(1),
        zeros if token_kl is None else ones,
    ]
    return torch.stack([row.to(widest(losses.device)) for row in rows])
