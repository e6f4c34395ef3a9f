"""Metrics of a policy over held-out pairs; the logprobs of policy and reference of a batch."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.errors import CacheMismatch, ConfigError
from minicache.options.train import LossOptions
from minicache.processes.devices import CPU, widest
from minicache.processes.world import World
from minicache.reports.held_out import HeldOut, held_out
from minicache.scoring.batch import Batch, References
from minicache.scoring.batching import Indices
from minicache.scoring.scorer import PairScores, Scorer
from minicache.scoring.tables import score_table
from minicache.trackers import Tracker
from minicache.training.losses import Logps, Objective
from minicache.training.metrics import Means, k3


@dataclass(frozen=True)
class EvalSet:
    """Pairs of a cache to evaluate on. indices: (n,) into the cache's pairs."""

    cached: CachedPairs
    indices: Indices

    @property
    def digest(self) -> str:
        """A digest of the set of these pairs, in any order."""
        digests = np.sort(self.cached.table.digest[self.indices, 0])
        return blake2b(digests.astype("<u8").tobytes(), digest_size=16).hexdigest()


def require_per_token(cache: ReferenceCache, options: LossOptions) -> None:
    """Raises CacheMismatch: the loss weights single tokens, and the cache does not hold each token's logprob."""
    if options.ld_alpha is not None and not cache.identity.per_token:
        raise CacheMismatch(
            f"--ld-alpha: needs each token's reference logprob, which {cache.path} does not hold; run precompute-ref with "
            "--per-token into another cache"
        )


@dataclass(frozen=True)
class Evaluation:
    """How a policy does on n held-out pairs. metrics: means over them; see metrics.py.

    preferences: (n, 3) float64, in the order of the pairs' indices: of each the reward margin, and the differences of chosen and
    rejected by policy and reference.
    """

    metrics: dict[str, float]
    preferences: NDArray[np.float64]

    @property
    def held_out(self) -> HeldOut:
        """The figures with intervals. A validation that is not the best needs none."""
        margins, policy, reference = self.preferences.T
        return held_out(margins, policy > 0, reference > 0)


class Stopped(Exception):
    """A validation was left half-way."""


def evaluate_policy(
    scorer: Scorer,
    pairs: EvalSet,
    objective: Objective,
    budget: int | None,
    world: World,
    tracker: Tracker,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """How a policy does on these pairs, which the processes share out. budget, stop: see `score_table`.

    Raises:
        ConfigError: the loss sorts over a batch, so it is not defined for a data set. Stopped: `stop` was true on some process; on
            all of them.
    """
    if name := objective.over_the_batch:
        raise ConfigError(
            f"--loss {name}: sorts over a training batch, so it says nothing of a data set; try --loss sigmoid"
        )
    asked = False

    def is_asked() -> bool:
        nonlocal asked
        asked = asked or stop()
        return asked

    table = pairs.cached.table
    means, chosen_tokens = Means(world.device), float(table.token_counts[pairs.indices, 0].mean())
    mine = pairs.indices[world.rank :: world.size]
    references = partial(references_of, pairs.cached, objective.options)
    load, preferences = None, []
    for indices, batch, scores in score_table(
        scorer, table, mine, budget, world.device, distribution=True, references=references, stop=is_asked
    ):
        logps = pair_logps(scores, batch, objective)
        means.add(objective(logps, chosen_tokens), logps, objective.beta, scores)
        preferences.append((indices, _preferences(logps, objective.beta)))
        if scores.load:
            load = scores.load + load if load else scores.load
        tracker.advance(len(indices) * world.size, int(table.side_lengths[indices].sum()) * world.size)
    # those that were not asked come when they have scored their share
    with world.watch.saving():
        stopped = any(world.gather(is_asked()))
    if stopped:
        raise Stopped
    # the share of one process may take longer than that of another
    metrics = means.reduce(world, patient=True)
    # over all pairs of the set together, because batches differ with the memory and the processes
    if loads := [each for each in world.gather(load and load.to(CPU)) if each]:
        whole = reduce(operator.add, loads)
        metrics["aux_loss"] = float(whole.loss(whole))
    return Evaluation(metrics, _gathered(world, preferences))


def _preferences(logps: Logps, beta: float) -> torch.Tensor:
    """(B, 3), as in `Evaluation`."""
    rewards = beta * logps.ratios
    return torch.stack([values[:, 0] - values[:, 1] for values in (rewards, logps.policy, logps.reference)], 1).detach()


def _gathered(world: World, preferences: list[tuple[Indices, torch.Tensor]]) -> NDArray[np.float64]:
    """Those of all processes, in the order of the pairs' indices: whatever the batches and the processes."""
    # a process may have no pairs
    mine = preferences and (
        np.concatenate([indices for indices, _ in preferences]),
        torch.cat([values for _, values in preferences]).cpu().double().numpy(),
    )
    every = [each for each in world.gather(mine) if each]
    order = np.concatenate([indices for indices, _ in every]).argsort()
    return np.concatenate([values for _, values in every])[order]


def references_of(cached: CachedPairs, options: LossOptions, indices: Indices, batch: Batch) -> References:
    """What the losses read of the cache for a batch, which is still on the CPU. indices: (B,) of its pairs."""
    means = torch.from_numpy(cached.reference.logp_mean[indices])
    if cached.reference.token_logps is None:
        return References(means)
    tokens = torch.from_numpy(cached.token_logps(indices))[batch.places]
    return References(means, tokens, None if options.ld_alpha is None else _ld_weights(batch, options.ld_alpha))


def pair_logps(scores: PairScores, batch: Batch, objective: Objective) -> Logps:
    """The logprobs of policy and reference for a batch, both as means or both as sums (mean x tokens)."""
    counts, averaged, known = scores.token_count, objective.kind == "mean", batch.references
    assert known is not None
    chosen_sum = token_kl = None
    if known.token_logps is not None:
        ratios = (scores.token_logps.detach() - known.token_logps)[batch.members]
        token_kl = batch.sum_members(k3(ratios)) / counts
    if known.token_logps is not None and known.weights is not None:
        policy, reference = (
            batch.sum_members(values[batch.members] * known.weights)
            for values in (scores.token_logps, known.token_logps)
        )
        if averaged:
            policy, reference = policy / counts, reference / counts
        chosen_sum = scores.logp_sum[:, 0]
    else:
        policy, reference = scores.logp_mean, known.means
        # both sums from means of the same precision, so that a policy that is the reference has their very number
        if not averaged:
            policy, reference = (means.to(widest(counts.device)) * counts for means in (policy, reference))
    return Logps(
        policy=policy,
        reference=reference,
        token_count=counts,
        averaged=averaged,
        alignment=scores.alignment,
        chosen_sum=chosen_sum,
        token_kl=token_kl,
    )


def _ld_weights(batch: Batch, alpha: float) -> torch.Tensor:
    """(M,) weights of tokens: 1 within the length of the shorter answer, `alpha` beyond.

    Source: Liu et al. 2024, Length Desensitization in DPO, arXiv:2409.06411, eq. 9, with counted tokens as the length, as TRL.
    """
    shared = batch.token_count.min(1).values.repeat_interleave(2)[batch.owners]
    return torch.where(batch.ranks() < shared, 1.0, alpha)
