"""Cached pairs scored by a model: metrics of a policy, and the check that a model reproduces its cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from minicache.attention import use_spans, why_not_branching
from minicache.batch import LAYOUTS, Batch
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import TOLERANCE, CachedPairs
from minicache.config_train import LossOptions
from minicache.data.batching import Indices, ahead
from minicache.distributed import World
from minicache.errors import CacheMismatch, ConfigError, HandshakeError, ModelError
from minicache.losses import Logps, Objective
from minicache.metrics import Means
from minicache.pairs import PairTable
from minicache.scoring import PairScores, Scorer
from minicache.trackers import Tracker

SAMPLE = 8
SLOTS = {"cpu": 16384, "cuda": 65536}  # of a forward pass: more at once makes it no faster


def settle_layout(scorer: Scorer, table: PairTable, asked: str, device: torch.device, tracker: Tracker) -> None:
    """Give the scorer the layout asked for, or of `auto` the first that gives this model the values of `padded`.

    Why a layout before it was not taken is noted.

    Raises:
        ConfigError: the layout asked for by name cannot be used with this model.
    """
    problems: list[str] = []
    for name in ("packed", "shared", "padded") if asked == "auto" else (asked,):
        problem = _problem(scorer, table, name, device)
        if problem is None:
            scorer.layout_name = name
            for line in problems[:1]:
                tracker.note(line)
            return
        problems.append(f"layout {name} is not used: {problem}")
    raise ConfigError(f"--layout {asked}: cannot be used with this model: {problem}; expected auto or padded")


def _problem(scorer: Scorer, table: PairTable, layout: str, device: torch.device) -> str | None:
    """Why this model cannot be scored in this layout, by its configuration or by a few short pairs; None if it can."""
    if layout == "padded":
        return None
    if reason := why_not_branching(scorer.model):
        return reason
    sample = np.argsort(table.lengths.sum(1), kind="stable")[:SAMPLE]
    try:
        use_spans(scorer.model)
        batches = [LAYOUTS[name].make(table, sample).to(device) for name in ("padded", layout)]
        with torch.no_grad():
            expected, found = map(scorer, batches)
        if device.type == "cuda" and any(parameter.requires_grad for parameter in scorer.parameters()):
            scorer(batches[1]).logp_sum.sum().backward()  # FlexAttention compiles that apart, and not for every model
            scorer.zero_grad(set_to_none=True)
    except Exception as error:  # whatever a model's own code or a compiler makes of it
        return " ".join(str(error).split())[:160] or type(error).__name__
    worst = float((expected.logp_mean - found.logp_mean).abs().max())
    return None if worst <= TOLERANCE[scorer.dtype] else f"it gives other logprobs, by up to {worst:.2g} nats a token"


@dataclass(frozen=True)
class EvalSet:
    """Pairs of a cache to evaluate on. indices: (n,) into the cache's pairs."""

    cached: CachedPairs
    indices: Indices

    @property
    def digest(self) -> str:
        """Of which pairs these are, in any order."""
        digests = np.sort(self.cached.table.digest[self.indices, 0])
        return blake2b(digests.astype("<u8").tobytes(), digest_size=16).hexdigest()


def require_per_token(cache: ReferenceCache, options: LossOptions) -> None:
    """Raises CacheMismatch: the loss weighs single tokens, and the cache does not hold what the reference said of each."""
    if options.ld_alpha is not None and not cache.identity.per_token:
        raise CacheMismatch(
            f"--ld-alpha: needs each token's reference logprob, which {cache.path} does not hold; run precompute-ref with "
            "--per-token into another cache"
        )


def score_table(
    scorer: Scorer,
    table: PairTable,
    indices: Indices,
    budget: int | None,
    device: torch.device,
    distribution: bool = False,
) -> Iterator[tuple[Indices, Batch, PairScores]]:
    """Score some pairs of a table in batches of similar length, without gradients.

    budget: token slots of a batch; None begins with as many as can make it faster. Where a batch does not fit in memory, it
    and those after it are made half as large. Of a model in shards every process must call this as often as the others, with
    few pairs, many or none: where one has no more, it takes part in the others' forward passes.

    Yields:
        the batch's indices into the table, the batch, its scores (see `Scorer` for `distribution`).

    Raises:
        ModelError: a single pair does not fit in memory.
    """
    left, budget = np.ones(len(table), bool), budget or SLOTS[device.type]
    while len(rest := indices[left[indices]]):
        for chosen, batch in ahead(scorer.batches(table, rest, budget)):
            moved = batch.to(device)
            if scorer.lockstep:
                scorer.lockstep.any(True)
            scores = _scores_if_they_fit(scorer, moved, distribution)
            if scores is None:
                slots = moved.input_ids.numel()
                if len(chosen) == 1:
                    raise ModelError(f"a pair of {slots:,} token slots does not fit in memory; lower --max-length")
                if scorer.lockstep:
                    raise ModelError(
                        f"{slots:,} token slots at once do not fit in memory, and shards cannot try again; lower their number"
                    )
                budget = min(budget, slots) // 2
                break
            left[chosen] = False
            yield chosen, moved, scores
    if scorer.lockstep:
        shortest = scorer.layout.make(table, table.lengths.sum(1).argmin()[None]).to(device)
        while scorer.lockstep.any(False):
            _scores_if_they_fit(scorer, shortest, distribution)


def _scores_if_they_fit(scorer: Scorer, batch: Batch, distribution: bool) -> PairScores | None:
    try:
        with torch.no_grad():  # not inference mode, whose tensors FSDP could not use in training afterwards
            return scorer(batch, distribution)
    except torch.OutOfMemoryError:
        pass  # the error holds on to what filled the memory: it must be gone before the next attempt
    torch.cuda.empty_cache()
    return None


def evaluate_policy(
    scorer: Scorer, pairs: EvalSet, objective: Objective, budget: int | None, world: World, tracker: Tracker
) -> dict[str, float]:
    """Mean metrics (see metrics.py) of a policy over these pairs, shared among the processes. budget: see `score_table`.

    Raises:
        ConfigError: the loss sorts over a batch, and a data set is no batch.
    """
    if name := objective.over_the_batch:
        raise ConfigError(
            f"--loss {name}: sorts over a training batch, so it says nothing of a data set; try --loss sigmoid"
        )
    table = pairs.cached.table
    means, chosen_tokens = Means(world.device), float(table.token_counts[pairs.indices, 0].mean())
    mine = pairs.indices[world.rank :: world.size]
    for indices, batch, scores in score_table(scorer, table, mine, budget, world.device, distribution=True):
        logps = pair_logps(scores, batch, pairs.cached, indices, objective)
        means.add(objective(logps, chosen_tokens), logps, objective.beta, scores)
        tracker.advance(len(indices) * world.size, int(table.side_lengths[indices].sum()) * world.size)
    return means.reduce(world)


def pair_logps(scores: PairScores, batch: Batch, cached: CachedPairs, indices: Indices, objective: Objective) -> Logps:
    """Policy's and reference's logprobs of a batch side by side, as means or as sums (mean x tokens): the same for both."""
    counts, averaged = scores.token_count, objective.kind == "mean"
    if objective.options.ld_alpha is not None:
        tokens = torch.from_numpy(cached.token_logps(indices)).to(counts.device)[batch.places]
        weights = _ld_weights(batch, counts, objective.options.ld_alpha)
        both = (scores.token_logps, tokens)
        policy, reference = (batch.sum_members(values[batch.members] * weights) for values in both)
        divisor = counts if averaged else torch.ones_like(counts)
        whole = scores.logp_sum[:, 0]
        return Logps(policy / divisor, reference / divisor, counts, averaged, scores.alignment, whole)
    reference = torch.from_numpy(cached.reference.logp_mean[indices]).to(counts.device)
    if averaged:
        return Logps(scores.logp_mean, reference, counts, averaged, scores.alignment)
    return Logps(scores.logp_sum, reference * counts, counts, averaged, scores.alignment)


def _ld_weights(batch: Batch, counts: torch.Tensor, alpha: float) -> torch.Tensor:
    """(M,) 1 for a token within the length of the shorter answer, `alpha` beyond.

    Source: Liu et al. 2024, Length Desensitization in DPO, arXiv:2409.06411, eq. 9, with counted tokens as the length, as TRL.
    """
    shared = counts.min(1).values.repeat_interleave(2)[batch.owners]
    return torch.where(batch.ranks() < shared, 1.0, alpha)


def sample_differences(scorer: Scorer, cached: CachedPairs, device: torch.device) -> tuple[Indices, np.ndarray]:
    """Re-score a few pairs spread over the cache; (n,) indices and (n, 2) |difference| of mean logprobs, nats a token."""
    sample = np.unique(np.linspace(0, len(cached.table) - 1, SAMPLE).astype(np.int64))
    differences = np.zeros((len(sample), 2))
    # one at a time: another batch shape than stage one's, as in training
    for indices, _, scores in score_table(scorer, cached.table, sample, 1, device):
        difference = np.abs(scores.logp_mean.double().cpu().numpy() - cached.reference.logp_mean[indices])
        differences[np.searchsorted(sample, indices)] = difference
    return sample, differences


def check_reproduces(scorer: Scorer, cached: CachedPairs, device: torch.device, tolerance: float, what: str) -> float:
    """The handshake: the model must give what the cache says. Returns the largest difference, nats a token.

    Raises:
        HandshakeError: naming the pairs that differ, and by how much.
    """
    sample, differences = sample_differences(scorer, cached, device)
    worst = differences.max(1)
    bad = ~(worst <= tolerance)  # a NaN is bad too
    if bad.any():
        listed = ", ".join(
            f"pair {pair} by {by:.2g}" for pair, by in list(zip(sample[bad], worst[bad], strict=True))[:4]
        )
        raise HandshakeError(
            f"{what} does not reproduce the cache: {int(bad.sum())} of {len(sample)} pairs re-scored differ by more than "
            f"{tolerance:g} nats a token ({listed}). Expected the same weights, config and code as when the cache was made"
        )
    return float(worst.max())
