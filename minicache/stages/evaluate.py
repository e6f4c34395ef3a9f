"""A policy against a reference cache: preference accuracy, margin, KL, loss."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minicache.cache.reader import ReferenceCache
from minicache.config import EvaluateConfig, LossOptions, TrainConfig
from minicache.distributed import World
from minicache.errors import CacheMismatch, OutputError
from minicache.evaluation import evaluate_policy
from minicache.losses import Objective
from minicache.models import load_model
from minicache.scoring import Scorer, resolve_dtype
from minicache.trackers import Tracker


@dataclass(frozen=True)
class EvaluateReport:
    """metrics: means over the cache's pairs, by the names of metrics.py, under `settings` (loss, loss_options, logps, beta).

    same_weights: the policy has the reference's own weights.
    """

    policy: str
    ref_cache: Path
    pairs: int
    same_weights: bool
    settings: dict[str, Any]
    metrics: dict[str, float]


def evaluate(config: EvaluateConfig, world: World, tracker: Tracker) -> EvaluateReport:
    """Score every pair of the cache with the policy. Raises MinicacheError of any kind."""
    settings = _settings(config)
    options = LossOptions(**settings["loss_options"])
    objective = Objective.parse(settings["loss"], settings["logps"], settings["beta"], options)
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
    metrics = evaluate_policy(scorer, table, reference, objective, config.tokens_per_batch, world, tracker)
    return EvaluateReport(config.policy, config.ref_cache, len(table), same, settings, metrics)


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """Loss, its options, logps and beta: what is asked for, else what the run was trained with, else the default of a run."""
    facts = run_facts(config.policy)
    names = ("loss", "logps", "beta")
    settings = {name: getattr(config, name) or facts.get(name, getattr(TrainConfig, name)) for name in names}
    return {**settings, "loss_options": facts.get("loss_options", asdict(LossOptions()))}


def run_facts(policy: str) -> dict[str, Any]:
    """What run.json says of a run directory; nothing for anything else."""
    file = Path(policy) / "run.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read: {error}") from error


def policy_source(policy: str) -> str:
    """The model of a run directory, or the name as it is."""
    model = Path(policy) / "model"
    return str(model) if (model / "config.json").is_file() else policy
