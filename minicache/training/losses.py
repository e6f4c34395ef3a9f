"""Preference losses: pure functions of the logprobs of policy and reference. options/catalog.py names them.

Each takes a `Logps` and returns (B,), one number per pair; the loss of a step is their mean. Where the literature and TRL
(`trl/trainer/dpo_trainer.py`, 1.16) follow different conventions, TRL's is used, and the docstring says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from minicache.errors import ConfigError
from minicache.options.catalog import LOSSES, code_of
from minicache.options.loss import BETAS, LossOptions
from minicache.options.objective import parse_loss
from minicache.training.divergences import divergence_named


@dataclass(frozen=True)
class Logps:
    """Logprobs of B pairs; column 0 is chosen, column 1 rejected.

    policy, reference: (B, 2) float32 or float64, nats: sums over the counted tokens, or means if `averaged`.
    token_count: (B, 2) float32.
    alignment: (B, 2) float32, nats per token; see `PairScores`. Only WPO needs it.
    chosen_sum: (B,) as these, nats: the unweighted sum over the chosen answer, where the two above weight tokens (LD-DPO).
    token_kl: (B, 2) float32, nats: `k3` of each counted token's log ratio, mean over a side's tokens. No loss reads it. None
    where the reference's logprobs of single tokens are not known.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    token_count: torch.Tensor
    averaged: bool
    alignment: torch.Tensor | None = None
    chosen_sum: torch.Tensor | None = None
    token_kl: torch.Tensor | None = None

    @property
    def ratios(self) -> torch.Tensor:
        """log pi(y|x) - log pi_ref(y|x), (B, 2); beta times it is DPO's implicit reward (arXiv:2305.18290, eq. 5)."""
        return self.policy - self.reference

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """(B, 2) values per token: sums are divided by the token counts, means are returned as they are."""
        return values if self.averaged else values / self.token_count


Loss = Callable[[Logps, float, LossOptions], torch.Tensor]


def loss_named(name: str) -> Loss:
    """The function of a loss in LOSSES."""
    loss: Loss = code_of(LOSSES[name])
    return loss


def _scores(logps: Logps, options: LossOptions) -> torch.Tensor:
    """(B, 2) f'(ratio)."""
    return divergence_named(options.f_divergence)(logps.ratios, options.f_alpha)


def _delta(logps: Logps, options: LossOptions) -> torch.Tensor:
    """(B,) chosen minus rejected score; a sigmoid loss takes beta times it."""
    scores = _scores(logps, options)
    return scores[:, 0] - scores[:, 1]


def _smoothed(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """(B,) cross entropy against labels that are flipped with probability `smoothing`."""
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


# --- losses on the difference between the two sides ---


def sigmoid(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """-log sigmoid(beta * delta): ln 2 where policy and reference agree.

    Source: Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7. With label smoothing it is
    conservative DPO: Mitchell 2023, A note on DPO with noisy preferences, eq. 3.
    """
    return _smoothed(beta * _delta(logps, options), options.label_smoothing)


def robust(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """An unbiased DPO loss where labels are flipped with probability `label_smoothing`.

    Source: Chowdhury et al. 2024, Provably Robust DPO, arXiv:2403.00409, eq. 12.
    """
    logits, flips = beta * _delta(logps, options), options.label_smoothing
    return (-(1 - flips) * logsigmoid(logits) + flips * logsigmoid(-logits)) / (1 - 2 * flips)


def hinge(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """max(0, 1 - beta * delta). Source: Zhao et al. 2023, SLiC-HF, arXiv:2305.10425; Liu et al. 2023, RSO, arXiv:2309.06657."""
    return torch.relu(1 - beta * _delta(logps, options))


def ipo(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """(delta per token - 1 / (2 beta))^2, always on means per token, as TRL agreed with the authors.

    Source: Azar et al. 2023, A General Theoretical Paradigm, arXiv:2310.12036, eq. 17.
    """
    scores = logps.per_token(_scores(logps, options))
    return (scores[:, 0] - scores[:, 1] - 1 / (2 * beta)) ** 2


def exo_pair(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """KL from the policy's preference to the (smoothed) label. Source: Ji et al. 2024, EXO, arXiv:2402.00856, eq. 16.

    Needs label_smoothing above 0, because it takes the logarithm of the label.
    """
    logits, epsilon = beta * _delta(logps, options), torch.tensor(options.label_smoothing, dtype=logps.policy.dtype)
    won = torch.sigmoid(logits) * (logsigmoid(logits) - torch.log1p(-epsilon))
    return won + torch.sigmoid(-logits) * (logsigmoid(-logits) - torch.log(epsilon))


def discopop(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """A blend of the logistic and the exponential loss; the log ratio sets its weights.

    Source: Lu et al. 2024, DiscoPOP, arXiv:2406.08414, eq. 5.
    """
    logits = beta * _delta(logps, options)
    blend = torch.sigmoid(logits / options.discopop_tau)
    # blend * exp(-logits), without inf * 0
    exponential = torch.exp(logsigmoid(logits / options.discopop_tau) - logits)
    return -logsigmoid(logits) * (1 - blend) + exponential


def sigmoid_norm(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """The sigmoid loss on means per token, whatever --logps is. Source: Lambert et al. 2024, Tülu 3, arXiv:2411.15124, eq. 6."""
    scores = logps.per_token(_scores(logps, options))
    return -logsigmoid(beta * (scores[:, 0] - scores[:, 1]))


def simpo(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """-log sigmoid(beta * (mean chosen - mean rejected logprob) - gamma). Does not use the reference.

    Source: Meng et al. 2024, SimPO, arXiv:2405.14734, eq. 6.
    """
    means = logps.per_token(logps.policy)
    return -logsigmoid(beta * (means[:, 0] - means[:, 1]) - options.simpo_gamma)


# --- losses on each side separately ---


def nca_pair(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Noise contrastive loss on the implicit reward of each answer.

    Source: Chen et al. 2024, Noise Contrastive Alignment, arXiv:2402.05369, eq. 11 for two answers.
    """
    chosen, rejected = (beta * logps.ratios).unbind(1)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Binary classification of each side, without reward shift as in TRL.

    Source: Jung et al. 2024, BCO, arXiv:2404.04656, eq. 7.
    """
    chosen, rejected = (beta * logps.ratios).unbind(1)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Squared distance of each log ratio from (win probability - 1/2) / beta.

    Source: Wu et al. 2024, SPPO, arXiv:2405.00675, eq. 4.7 with win probabilities 1 and 0.
    """
    chosen, rejected = logps.ratios.unbind(1)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Raises chosen and lowers rejected: for data better than the model's own answers.

    Source: D'Oosterlinck et al. 2024, Anchored Preference Optimization, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = (beta * logps.ratios).unbind(1)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Lowers both answers, rejected more: for data worse than the model's own answers. Source: as apo_zero, eq. 8."""
    chosen, rejected = (beta * logps.ratios).unbind(1)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


# --- losses that sort over the batch ---


def aot(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Compares the sorted log odds of the policy with the sorted log odds of the reference.

    Source: Melnyk et al. 2024, AOT, arXiv:2406.05882, the paired form.
    """
    policy, reference = (values[:, 0] - values[:, 1] for values in (logps.policy, logps.reference))
    return _smoothed(beta * (policy.sort().values - reference.sort().values), options.label_smoothing)


def aot_unpaired(logps: Logps, beta: float, options: LossOptions) -> torch.Tensor:
    """Compares the sorted chosen ratios with the sorted rejected ratios. Source: as aot, the unpaired form."""
    chosen, rejected = logps.ratios.unbind(1)
    return _smoothed(beta * (chosen.sort().values - rejected.sort().values), options.label_smoothing)


def wpo_weights(alignment: torch.Tensor) -> torch.Tensor:
    """(B, 2) -> (B,): the policy's likelihood of both answers, each token relative to a token sampled from the policy.

    Source: Zhou et al. 2024, WPO, arXiv:2406.11827, eq. 2 with the sampled alignment of section 3.2, as TRL.
    """
    return alignment.detach().sum(1).exp()


@dataclass(frozen=True)
class Objective:
    """The objective of a run: weighted losses on mean or summed logprobs, and an optional SFT term.

    losses: weight of each loss by its name. kind: "mean" or "sum" of a side's logprobs.
    """

    losses: Mapping[str, float]
    kind: str
    beta: float
    options: LossOptions

    @classmethod
    def parse(cls, loss: str, kind: str, beta: float | None, options: LossOptions) -> "Objective":
        """The objective of these options. beta: None is the default for `kind`.

        Raises:
            ConfigError: the loss is unknown, or the options do not suit it.
        """
        losses = parse_loss(loss)
        if "exo_pair" in losses and options.label_smoothing == 0:
            raise ConfigError("--loss exo_pair: needs --label-smoothing above 0 (TRL's old default: 0.001), got 0")
        objective = cls(losses, kind, BETAS[kind] if beta is None else beta, options)
        if options.wpo and objective.over_the_batch:
            raise ConfigError(
                f"--wpo: weights single pairs, which --loss {objective.over_the_batch} sorts apart; use one of the two"
            )
        return objective

    @property
    def over_the_batch(self) -> str | None:
        """The name of a loss that sorts over the whole batch, so that the batch cannot be split; None without one."""
        return next((name for name in self.losses if LOSSES[name].over_the_batch), None)

    def __call__(self, logps: Logps, chosen_tokens: float) -> torch.Tensor:
        """(B,) loss of each pair. chosen_tokens: mean number of counted tokens of chosen answers over the whole step.

        The SFT term is the mean over all chosen tokens of the step, as in TRL; with the preference loss it is RPO
        (Pang et al. 2024, Iterative Reasoning Preference Optimization, arXiv:2404.19733, eq. 1).
        """
        parts = [weight * loss_named(name)(logps, self.beta, self.options) for name, weight in self.losses.items()]
        total = torch.stack(parts).sum(0)
        if self.options.wpo:
            assert logps.alignment is not None
            total = total * wpo_weights(logps.alignment)
        if self.options.sft_weight:
            chosen = logps.chosen_sum
            if chosen is None:
                chosen = logps.policy[:, 0] * (logps.token_count[:, 0] if logps.averaged else 1)
            total = total - self.options.sft_weight * chosen / chosen_tokens
        return total
