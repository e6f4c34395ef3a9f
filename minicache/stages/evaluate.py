"""A policy against a reference cache: preference accuracy, margin, KL, loss."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minicache.cache.reader import ReferenceCache
from minicache.config import EvaluateConfig
from minicache.distributed import World
from minicache.errors import CacheMismatch
from minicache.evaluation import evaluate_policy
from minicache.losses import find_loss
from minicache.models import load_model
from minicache.scoring import Scorer, resolve_dtype
from minicache.trackers import Tracker


@dataclass(frozen=True)
class EvaluateReport:
    """metrics: means over the cache's pairs, by the names of metrics.py. same_weights: the policy is the reference."""

    policy: str
    ref_cache: Path
    pairs: int
    same_weights: bool
    metrics: dict[str, float]


def evaluate(config: EvaluateConfig, world: World, tracker: Tracker) -> EvaluateReport:
    """Score every pair of the cache with the policy. Raises MinicacheError of any kind."""
    loss = find_loss(config.loss)
    tracker.begin("reading the cache", None)
    cache = ReferenceCache(config.ref_cache)
    table, reference = cache.load()
    source = policy_source(config.policy)
    tracker.begin(f"loading {source}", None)
    loaded = load_model(source, config.trust_remote_code)
    if loaded.vocabulary != cache.identity.vocabulary:
        raise CacheMismatch(
            f"{source}: vocabulary of {loaded.vocabulary}; {cache.path} was made with one of {cache.identity.vocabulary}"
        )
    same = loaded.fingerprint == cache.identity.weights
    scorer = Scorer(loaded.model.to(world.device, torch.float32), resolve_dtype(config.dtype, world.device))
    metrics = evaluate_policy(
        scorer, table, reference, loss, config.logps, config.beta, config.tokens_per_batch, world, tracker
    )
    return EvaluateReport(config.policy, config.ref_cache, len(table), same, metrics)


def policy_source(policy: str) -> str:
    """The model of a run directory, or the name as it is."""
    model = Path(policy) / "model"
    return str(model) if (model / "config.json").is_file() else policy
