"""What an adapter's directory holds, checked before it is used: peft's settings and weights, perhaps resized embeddings."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from minicache.errors import ModelError
from minicache.models.directories import require_plain_files
from minicache.models.peft_library import library, quiet
from minicache.text import listed, one_line

ADAPTER = "adapter_config.json"
PREFIX = "base_model.model."
# A rank that any machine has memory for: so many times that of the adapter's own matrices, or this one.
FAR, SMALL_RANK = 8, 256


def settings_of(directory: Path) -> Any:
    """The peft configuration in a directory, of an adapter that can be merged into a causal language model.

    Raises:
        ModelError: it cannot be read, is of a kind that cannot be merged, or says something that this peft does not know.
        ConfigError: peft is not installed.
    """
    peft = library()
    file = directory / ADAPTER
    require_plain_files(directory)
    try:
        with quiet():
            config = peft.PeftConfig.from_pretrained(str(directory))
        stated = json.loads(file.read_text(encoding="utf-8"))
    # peft raises KeyError, TypeError, ValueError and others on a file of another kind
    except Exception as error:
        line = one_line(error, 300)
        raise ModelError(f"{file}: peft cannot read it as an adapter's configuration: {line}") from error
    known = {item.name for item in fields(config)}
    # Settings of a newer peft that say nothing may stay.
    strange = sorted(name for name, value in stated.items() if name not in known and value)
    if strange:
        raise ModelError(
            f"{file}: the installed peft {peft.__version__} does not know {listed(strange)}; update peft, or train "
            "the adapter again with a version that both have"
        )
    if problem := _why_not_merged(config):
        raise ModelError(f"{directory}: {problem}")
    config.inference_mode = False
    return config


def _why_not_merged(config: Any) -> str | None:
    """Why an adapter cannot become part of a causal language model's weights; None if it can."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        return f"an adapter for {task}; expected one of a causal language model (task_type CAUSAL_LM)"
    if config.is_prompt_learning or config.is_adaption_prompt or kind in ("XLORA", "POLY", "CARTRIDGE"):
        return (
            f"an adapter of the kind {kind}, which adds to the input or chooses at run time and cannot be merged into weights; "
            "expected one that changes weights, such as LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        return "an activated LoRA (alora_invocation_tokens) works on a part of the text only and cannot be merged into weights"
    if getattr(config, "megatron_config", None):
        return "its megatron_config makes peft import a module that the file names; remove the entry"
    if (
        getattr(config, "revision", None) not in (None, "main")
        and not Path(str(config.base_model_name_or_path)).exists()
    ):
        return (
            f"names revision {config.revision} of its base {config.base_model_name_or_path}; expected a directory: download that "
            f"revision and write its path to base_model_name_or_path in {ADAPTER}"
        )
    return None


def require_ranks(config: Any, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Require that no rank of a LoRA's settings is larger by far than those of its matrices: peft makes others of that rank first.

    A rank may be of modules that the adapter does not have, and one that is a little too large is named where it does not fit.

    Raises:
        ModelError: one is.
    """
    if config.peft_type.value not in ("LORA", "ADALORA"):
        return
    held = max(
        (len(each) for key, each in weights.items() if ".lora_A" in key or ".lora_embedding_A" in key), default=0
    )
    ranks = [config.r, getattr(config, "init_r", 0), *(config.rank_pattern or {}).values()]
    largest = max(rank for rank in ranks if isinstance(rank, int))
    if largest > max(FAR * held, SMALL_RANK):
        raise ModelError(
            f"{directory / ADAPTER}: a rank of {largest:,}, where the adapter's matrices have {held} at most; expected their rank"
        )


def resize(base: Any, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Give the base as many embeddings as the adapter's file holds, if it holds any.

    Raises:
        ModelError: the file holds some of the resized layers only; the new rows of the others would be random.
    """
    layers = {"input": base.get_input_embeddings(), "output": base.get_output_embeddings()}
    names = {part: name for name, module in base.named_modules() for part, layer in layers.items() if module is layer}
    held = {
        name: weights[key]
        for name in names.values()
        for key in (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.base_layer.weight")
        if key in weights
    }
    sizes = {len(weight) for weight in held.values()}
    now = base.get_input_embeddings().num_embeddings
    if not sizes or sizes == {now}:
        return
    tied = layers["output"] is None or layers["output"].weight is layers["input"].weight
    missing = [] if tied else [name for name in names.values() if name not in held]
    if len(sizes) > 1 or missing:
        raise ModelError(
            f"{directory}: its file holds embeddings for {' and '.join(map(str, sorted(sizes)))} tokens, the base has {now}, and "
            f"{', '.join(missing) or 'the two layers'} would not fit; save the adapter with save_embedding_layers=True"
        )
    # Every row comes from the file.
    base.resize_token_embeddings(sizes.pop(), mean_resizing=False)


def repeated(weights: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of weights that peft writes twice or for nothing: of a layer saved as a whole, whose embeddings it saves too."""
    inner = (".modules_to_save.weight", ".original_module.weight")
    wholes = {key: key.removesuffix(suffix) + ".weight" for key in weights for suffix in inner if key.endswith(suffix)}
    return {
        key
        for key, whole in wholes.items()
        if whole in weights and (key.endswith(inner[1]) or torch.equal(weights[key], weights[whole]))
    }


def require_all(directory: Path, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Require that no weights are missing or left over.

    Raises:
        ModelError: there are; the first are named.
    """
    for keys, what in ((missing, "lacks the weights"), (left_over, "has weights that fit nothing in the model:")):
        names = [key.removeprefix(PREFIX).replace(".default", "") for key in keys]
        if names:
            raise ModelError(
                f"{directory}: the adapter does not fit its base model: its file {what} {listed(names)}; peft "
                "would go on without a word"
            )
