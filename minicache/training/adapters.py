"""The adapters that a run trains: new ones on the reference, the reference's own, or those of a checkpoint."""

from pathlib import Path
from typing import Any

from torch import nn

from minicache.errors import ConfigError
from minicache.failures import writing
from minicache.models import LoadedModel, load_model, save_model
from minicache.models.adapter_files import settings_of
from minicache.models.adapter_places import MERGED_BASE, adapter_place, base_name
from minicache.models.joined import change_of, restore
from minicache.models.load import lasting_name
from minicache.models.lora import add_lora, is_joined, quantization_of, with_adapter
from minicache.options.train import TrainConfig
from minicache.scoring.loading import Sources
from minicache.trackers import Tracker


def with_adapters(
    config: TrainConfig, loaded: LoadedModel, source: str, checkpoint: Path | None, sources: Sources, tracker: Tracker
) -> nn.Module:
    """The model to start from with new adapters, or with its own, or with those of a checkpoint.

    source: its lasting name. What is saved must open elsewhere: an adapter names its true base. If that has other adapters on it,
    they are joined with the trained one, or, where that cannot be, the run writes the merged base too (`base_beside`).

    Raises:
        ModelError: the adapters do not fit. ConfigError: there is no adapter to continue, or not of a kind that can be.
    """
    own = _adapter_to_continue(loaded.source) if config.lora.continue_adapter else None
    if own:
        name = base_name(own)
        held = quantization_of(own)
        if loaded.quantization != held and loaded.quantization:
            raise ConfigError(
                f"--continue-adapter: the base was quantized with {loaded.source} merged into it; expected --lora-rank 16, for a "
                "new adapter on both"
            )
        loaded, source = sources.model(name, config.trust_remote_code, held), lasting_name(name)
    elif hasattr(loaded.model, "get_base_model"):
        raise ConfigError(
            f"{loaded.source}: is an adapter on a quantized base; expected --continue-adapter, or a cache of the model that "
            "`minidpo export` makes of it"
        )
    # Before the base is converted: the digest is of the weights as they are stored.
    weights = loaded.fingerprint
    joined = checkpoint is not None and is_joined(checkpoint)
    if checkpoint and not joined:
        adapted = with_adapter(loaded.model, checkpoint)
    elif own:
        adapted = with_adapter(loaded.model, own)
    else:
        adapted = add_lora(loaded.model, source, config.lora, config.seed, tracker)
    if checkpoint and joined:
        restore(adapted, checkpoint)
    adapted.base_fingerprint, adapted.base_quantization = weights, loaded.quantization
    if below := loaded.below:
        # adapters that were merged before quantization are no longer sums beside it
        if not loaded.quantization and below.change is not None and change_of(adapted) is not None:
            adapted.below = below
        else:
            adapted.base_beside = source
            source = str((config.out / MERGED_BASE).resolve())
    adapted.peft_config["default"].base_model_name_or_path = source
    found: nn.Module = adapted
    return found


def _adapter_to_continue(source: str) -> Path:
    """The directory of an adapter. Raises ConfigError: the model is none, or one of a kind that is not trained here."""
    place = adapter_place(source)
    if place is None:
        raise ConfigError(
            f"--continue-adapter: {source} is no adapter; expected one, or --lora-rank 16 for a new one on it"
        )
    kind = settings_of(place).peft_type.value
    if kind != "LORA":
        raise ConfigError(
            f"--continue-adapter: {source} is an adapter of the kind {kind}; expected LORA, or --lora-rank 16 for a new one on it"
        )
    return place


def write_base_beside(model: Any, config: TrainConfig, tokenizer_dir: Path, tracker: Tracker) -> None:
    """Write the merged base of a model's adapters into the run's directory, where they need one and it is not there yet.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    place = config.out / MERGED_BASE
    source = getattr(model, "base_beside", None)
    if source is None or place.exists():
        return
    tracker.note(f"the adapters of {source} and of this run cannot be one: their merged base is written to {place}")
    merged = load_model(source, config.trust_remote_code).model
    with writing(place):
        save_model(merged, tokenizer_dir, place)
