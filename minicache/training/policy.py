"""The model that a run trains."""

from dataclasses import dataclass

from torch import nn

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheMismatch, ConfigError, ModelError
from minicache.models import LoadedModel, load_model
from minicache.models.load import lasting_name
from minicache.models.quantized import is_quantized
from minicache.models.whole import beside_text
from minicache.options.base import flag_of
from minicache.options.train import TrainConfig
from minicache.scoring.loading import Sources
from minicache.trackers import Tracker
from minicache.training import checkpoints
from minicache.training.adapters import with_adapters


@dataclass(frozen=True)
class Policy:
    """A model to train, its weights as they are stored.

    started_from: name of the model it started from. stored_dtype: precision in which that model's weights are stored.
    quantization: in which its linear layers are held, if they are not stored so.
    These are "" for a whole model from a checkpoint; the run's record holds them.
    """

    model: nn.Module | None
    started_from: str = ""
    stored_dtype: str = ""
    quantization: str = ""


def quantization_for(config: TrainConfig, cache: ReferenceCache) -> str:
    """The quantization in which the policy's base is held: that of the reference; with --init-from, the one asked for.

    Raises:
        CacheMismatch: another one is asked for. ConfigError: all weights of a quantized model would be trained.
    """
    asked, made = config.base.quantization, cache.identity.quantization
    if config.init_from:
        return asked
    if asked and asked != made:
        held = f"with its base in {made}" if made else "with its weights as they are stored"
        raise CacheMismatch(
            f"{flag_of(asked)}: {cache.path} was made {held}, and the policy begins as the reference; leave it out, or run "
            f"precompute-ref {flag_of(asked)} into another cache"
        )
    if made and not config.lora.wanted:
        raise ConfigError(
            f"{cache.path}: made with its base in {made}; quantized weights cannot be trained, adapters on them can: add "
            "--lora-rank 16, or run precompute-ref without the quantization into another cache"
        )
    return made


def load_policy(
    config: TrainConfig, cache: ReferenceCache, resume_at: int | None, tracker: Tracker, sources: Sources
) -> Policy:
    """The policy to train: the reference, the model of --init-from, or the checkpoint at `resume_at`.

    With --lora-rank or --continue-adapter it has adapters.

    Raises:
        ModelError: it cannot be loaded. CacheMismatch: it is not the model that the cache was made with.
    """
    checkpoint = None if resume_at is None else checkpoints.place(config.out, resume_at) / "model"
    if checkpoint and not config.lora.wanted:
        return Policy(_trainable(load_model(str(checkpoint), config.trust_remote_code).model))
    loaded = _load(config, cache, tracker, sources)
    source, stored = lasting_name(loaded.source), _stored_dtype(loaded.model)
    if config.lora.wanted:
        adapted = with_adapters(config, loaded, source, checkpoint, sources, tracker)
        return Policy(adapted, source, stored, getattr(adapted, "base_quantization", ""))
    if is_quantized(loaded.model):
        raise ConfigError(
            f"{loaded.source}: its weights are quantized, which cannot be trained; adapters on them can: add --lora-rank 16, or "
            "expected an unquantized copy of the model"
        )
    return Policy(_trainable(loaded.model), source, stored)


def _trainable(model: nn.Module) -> nn.Module:
    """The model with gradients for all weights that text reaches; DDP would wait for those of others."""
    frozen = set(beside_text(model))
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)
    return model


def _stored_dtype(model: nn.Module) -> str:
    """The precision of the model's first weights that are not quantized."""
    return str(next(each.dtype for each in model.parameters() if each.is_floating_point())).removeprefix("torch.")


def require_vocabulary(loaded: LoadedModel, source: str, cache: ReferenceCache) -> None:
    """Raises CacheMismatch: a policy's vocabulary is not that of the cache."""
    if loaded.vocabulary != cache.identity.vocabulary:
        raise CacheMismatch(
            f"{source}: vocabulary of {loaded.vocabulary}; {cache.path} was made with one of {cache.identity.vocabulary}"
        )


def _load(config: TrainConfig, cache: ReferenceCache, tracker: Tracker, sources: Sources) -> LoadedModel:
    """The model of --init-from or --model, or the one that stage one used, checked against the cache."""
    source, quantization = config.init_from or config.model or cache.log.model, quantization_for(config, cache)
    tracker.begin(f"loading {source}", None)
    try:
        loaded = sources.model(source, config.trust_remote_code, quantization)
    except ModelError as error:
        if config.init_from or config.model:
            raise
        raise ModelError(
            f"{error} (stage one found it there; name the place of the same weights with --model)"
        ) from error
    loaded.note_left_out(tracker.note)
    require_vocabulary(loaded, source, cache)
    if config.init_from is None and loaded.fingerprint != cache.identity.weights:
        raise CacheMismatch(
            f"{source}: weights digest {loaded.fingerprint}, but {cache.path} was made with {cache.identity.weights}. "
            "Point --model at the weights stage one used, run precompute-ref with these into another cache, "
            "or start from these on purpose with --init-from"
        )
    return loaded
