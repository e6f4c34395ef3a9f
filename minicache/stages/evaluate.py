"""Evaluation of a policy against a reference cache: preference accuracy, margin, KL, loss."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.errors import MinicacheError
from minicache.models import LoadedModel, load_model
from minicache.options.dictionaries import fill, flat
from minicache.options.loss import BETAS, LossOptions
from minicache.options.others import EvaluateConfig
from minicache.options.where import Where, different, local_path
from minicache.processes.world import World
from minicache.reports.held_out import HeldOut, words_on_policy
from minicache.scoring.budget import scoring_budget
from minicache.scoring.dtype import agreed_dtype
from minicache.scoring.layout import settle_layout
from minicache.scoring.loading import load_pairs
from minicache.scoring.spread import spread
from minicache.trackers import Tracker
from minicache.training.losses import Objective
from minicache.training.policy import require_vocabulary
from minicache.training.run_directory import DEFAULTS, RunRecord, final_beta, reading, run_behind
from minicache.training.validation import EvalSet, evaluate_policy, require_per_token


@dataclass(frozen=True)
class EvaluateReport:
    """The result of an evaluation.

    metrics: means over the cache's pairs, by the names of metrics.py. settings: loss and its options, logps, beta.
    same_weights: whether the policy has the weights of the reference. held_out: figures with intervals. words: what they mean.
    """

    policy: str
    ref_cache: Where
    pairs: int
    same_weights: bool
    settings: dict[str, Any]
    metrics: dict[str, float]
    held_out: HeldOut
    words: list[str]


def evaluate(config: EvaluateConfig, world: World, tracker: Tracker) -> EvaluateReport:
    """Score every pair of the cache with the policy; returns the mean metrics. Raises MinicacheError of any kind."""
    run = run_behind(config.policy)
    settings, options = _settings(config, run)
    objective = Objective.parse(settings["loss"], settings["logps"], settings["beta"], options)
    cache = world.each(lambda: ReferenceCache(config.ref_cache))
    require_per_token(cache, options)
    cached = load_pairs(cache, config.scratch, world, tracker)
    loaded = world.each(lambda: _load(config, cache, tracker))
    if world.size > 1:
        world.agree(lambda: {"the policy's weights, their digest": loaded.fingerprint})
    identity = cache.identity
    same = (loaded.fingerprint, loaded.quantization) == (identity.weights, identity.quantization)
    dtype = agreed_dtype(config.dtype, world, tracker.note)
    scorer = spread(loaded.model, dtype, "ddp", world)
    if run and run.options["balance"] is not None:
        scorer.weigh_balance(run.options["balance"])
    settle_layout(scorer, cached.table, "auto", world, tracker)
    pairs = EvalSet(cached, np.arange(len(cached.table)))
    _note_other_reference(config, run, cache, tracker)
    budget = config.tokens_per_batch or scoring_budget(scorer, cached.table, world, tracker)
    tracker.begin("evaluating", len(cached.table))
    found = evaluate_policy(scorer, pairs, objective, budget, world, tracker)
    return EvaluateReport(
        policy=config.policy,
        ref_cache=cache.path,
        pairs=len(cached.table),
        same_weights=same,
        settings={**settings, **flat(options)},
        metrics=found.metrics,
        held_out=found.held_out,
        words=words_on_policy(found.metrics, found.held_out, same),
    )


def _settings(config: EvaluateConfig, run: RunRecord | None) -> tuple[dict[str, Any], LossOptions]:
    """Loss, logps and beta, and the options of the loss: as asked for, else as in the run's validation, else the defaults."""
    used = run.options if run else DEFAULTS
    logps = config.logps or used["logps"]
    kept = final_beta(used["beta"], used["beta_end"]) if run else BETAS[logps]
    settings = {"loss": config.loss or used["loss"], "logps": logps, "beta": config.beta or kept}
    return settings, fill(LossOptions, used)


def _note_other_reference(
    config: EvaluateConfig, run: RunRecord | None, cache: ReferenceCache, tracker: Tracker
) -> None:
    """Note where the cache holds another reference than the one that the policy's run was trained against."""
    # the same one needs no look, and a store that cannot be reached would be waited for
    if run is None or local_path(run.ref_cache) is None or not different((run.ref_cache, config.ref_cache)):
        return
    with suppress(MinicacheError):  # it may be gone by now
        other = ReferenceCache(run.ref_cache)
        references = [(each.identity.weights, each.identity.quantization) for each in (other, cache)]
        if references[0] != references[1]:
            tracker.note(
                f"{cache.path}: holds the logprobs of {cache.log.model}, and {config.policy} was trained against those of "
                f"{other.log.model}: margins are against another reference"
            )


def _load(config: EvaluateConfig, cache: ReferenceCache, tracker: Tracker) -> LoadedModel:
    """The policy. Raises CacheMismatch: its vocabulary is not that of the cache."""
    with reading(config.policy) as source:
        tracker.begin(f"loading {source}", None)
        loaded = load_model(source, config.trust_remote_code)
        loaded.note_left_out(tracker.note)
    require_vocabulary(loaded, source, cache)
    return loaded
