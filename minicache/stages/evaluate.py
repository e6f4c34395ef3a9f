"""A policy against a reference cache: preference accuracy, margin, KL, loss."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheMismatch
from minicache.models import load_model
from minicache.options.dictionaries import fill, flat, require_types
from minicache.options.others import EvaluateConfig
from minicache.options.train import LossOptions, TrainConfig
from minicache.options.where import Where
from minicache.processes.world import World
from minicache.scoring.layout import settle_layout
from minicache.scoring.loading import load_pairs
from minicache.scoring.scorer import Scorer, resolve_dtype
from minicache.trackers import Tracker
from minicache.training.losses import Objective
from minicache.training.run_directory import policy_source, run_behind
from minicache.training.validation import EvalSet, evaluate_policy, require_per_token


@dataclass(frozen=True)
class EvaluateReport:
    """metrics: means over the cache's pairs, by the names of metrics.py, under `settings` (loss and its options, logps, beta).

    same_weights: the policy has the reference's own weights.
    """

    policy: str
    ref_cache: Where
    pairs: int
    same_weights: bool
    settings: dict[str, Any]
    metrics: dict[str, float]


def evaluate(config: EvaluateConfig, world: World, tracker: Tracker) -> EvaluateReport:
    """Score every pair of the cache with the policy. Raises MinicacheError of any kind."""
    facts = run_behind(config.policy)
    require_types(TrainConfig, facts)
    names = ("loss", "logps", "beta")
    # what is asked for, else what the run was trained with, else the default of a run
    settings = {name: getattr(config, name) or facts.get(name, getattr(TrainConfig, name)) for name in names}
    options = fill(LossOptions, facts)
    objective = Objective.parse(settings["loss"], settings["logps"], settings["beta"], options)
    cache = ReferenceCache(config.ref_cache)
    require_per_token(cache, options)
    cached = load_pairs(cache, config.scratch, world, tracker)
    source = policy_source(config.policy)
    tracker.begin(f"loading {source}", None)
    loaded = load_model(source, config.trust_remote_code)
    if loaded.vocabulary != cache.identity.vocabulary:
        raise CacheMismatch(
            f"{source}: vocabulary of {loaded.vocabulary}; {cache.path} was made with one of {cache.identity.vocabulary}"
        )
    same = loaded.fingerprint == cache.identity.weights
    scorer = Scorer(loaded.model.to(world.device, torch.float32), resolve_dtype(config.dtype, world.device))
    settle_layout(scorer, cached.table, "auto", world.device, tracker)
    pairs = EvalSet(cached, np.arange(len(cached.table)))
    tracker.begin("evaluating", len(cached.table))
    metrics = evaluate_policy(scorer, pairs, objective, config.tokens_per_batch, world, tracker)
    return EvaluateReport(config.policy, cache.path, len(cached.table), same, {**settings, **flat(options)}, metrics)
