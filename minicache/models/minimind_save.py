"""Saving a model that was loaded from a MiniMind checkpoint as one again."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.disk import written_whole
from minicache.errors import ModelError
from minicache.failures import system_error
from minicache.models.generations import GENERATIONS, Counts, Generation, State, file_keys, turned, unstack
from minicache.models.minimind import ROPE_THETA

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def save_pth(model: nn.Module, path: Path, dtype: str = "float16", is_new: bool = False) -> str:
    """Write the state dict that the model's MiniMind generation loads: all its keys, none tied. Whole or not at all.

    dtype: "float32" or "float16" (which MiniMind itself writes). is_new: as for `minicache.disk.written_whole`.

    Returns:
        The name under which `load_model` reads it as the same model: the path, and behind a colon the settings that the file
        lacks and that differ from the generation's defaults.

    Raises:
        ModelError: the model was not loaded from a MiniMind checkpoint, or its numbers do not fit the precision.
        OutputError: the disk is full or cannot be written.
    """
    if dtype not in DTYPES:
        raise ModelError(f"{path}: a MiniMind checkpoint in {dtype}: expected {' or '.join(DTYPES)}")
    generation = _generation(model, path)
    plain, counts = _plain(model, generation)
    try:
        keys = file_keys(generation, counts).items()
        state = {key: plain[name].detach().to("cpu", DTYPES[dtype], copy=True).contiguous() for name, key in keys}
    except KeyError as error:
        raise ModelError(f"{path}: the model has no {error}, which a MiniMind {generation.name} file needs") from error
    broken = [key for key, weight in state.items() if not weight.isfinite().all()]
    if broken:
        raise ModelError(
            f"{path}: {broken[0]} holds numbers that are not finite in {dtype}; a larger dtype may hold them"
        )
    _write(state, path, is_new)
    return _name(path, model.config, generation, counts)


def _generation(model: nn.Module, path: Path) -> Generation:
    config: Any = model.config
    generation = GENERATIONS.get(str(getattr(config, "minimind", None)))
    if generation is None or config.model_type not in (generation.dense, generation.experts.family):
        raise ModelError(
            f"{path}: only a model that was loaded from a MiniMind .pth can be written as one, because MiniMind's code computes "
            f"nothing else; this is a {config.model_type} model; save it as a Hugging Face directory"
        )
    return generation


def _plain(model: nn.Module, generation: Generation) -> tuple[State, Counts]:
    """The model's tensors, one for each expert, with rows of q and k in the order of the generation's rotary positions."""
    config: Any = model.config
    state = model.state_dict()
    if config.model_type == generation.dense:
        plain, counts = state, Counts(config.num_hidden_layers, 0, 0)
    else:
        plain, counts = unstack(state, generation.experts)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    return turned(plain, generation, heads, back=True), counts


def _write(state: State, path: Path, is_new: bool) -> None:
    with written_whole(path, is_new) as draft:
        try:
            torch.save(state, draft)
        # torch's zip writer raises it when the disk is full
        except RuntimeError as error:
            raise system_error(error, draft.parent) from error


def _name(path: Path, config: Any, generation: Generation, counts: Counts) -> str:
    settings: dict[str, float] = {}
    if not generation.head_norms and (config.num_attention_heads, config.num_key_value_heads) != (
        generation.heads,
        generation.kv_heads,
    ):
        settings = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    if counts.experts and config.num_experts_per_tok != generation.experts_per_token:
        settings["experts_per_token"] = config.num_experts_per_tok
    if config.rms_norm_eps != generation.rms_eps:
        settings["rms_eps"] = config.rms_norm_eps
    if (theta := config.rope_parameters["rope_theta"]) != ROPE_THETA:
        settings["rope_theta"] = theta
    return f"{path}:{','.join(f'{name}={value}' for name, value in settings.items())}" if settings else str(path)
