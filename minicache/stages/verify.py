"""`inspect-cache --verify --model M`: does this model still say what the cache holds?"""

import torch

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import TOLERANCE
from minicache.config import InspectConfig
from minicache.distributed import World
from minicache.errors import CacheMismatch
from minicache.evaluation import check_reproduces
from minicache.models import load_model
from minicache.scoring import Scorer
from minicache.stages.load import load_pairs
from minicache.trackers import Tracker


def verify(config: InspectConfig, world: World, tracker: Tracker) -> float:
    """Re-score a sample of the cache. Returns the largest difference, nats a token.

    Raises:
        CacheMismatch: the model has other weights. HandshakeError: the same weights give other logprobs.
    """
    assert config.model
    cache = ReferenceCache(config.ref_cache)
    cached = load_pairs(cache, None, world, tracker)
    tracker.begin(f"loading {config.model}", None)
    loaded = load_model(config.model, config.trust_remote_code)
    if loaded.fingerprint != cache.identity.weights:
        raise CacheMismatch(
            f"{config.model}: weights digest {loaded.fingerprint}, the cache was made with {cache.identity.weights}"
        )
    tracker.begin("re-scoring a sample", None)
    dtype = cache.identity.dtype
    scorer = Scorer(loaded.model.to(world.device, torch.float32), dtype)
    return check_reproduces(scorer, cached, world.device, TOLERANCE[dtype], config.model)
