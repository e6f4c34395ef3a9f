"""Whether a checkpoint is a causal language model and is used whole: nothing is missing, nothing made up, nothing left over.

transformers fills missing weights with random numbers and drops what it has no place for; both would be scored as if they were
the user's model.
"""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.disk import read_json
from minicache.errors import ModelError
from minicache.models.file_kinds import is_path
from minicache.text import listed

# Tables that older releases saved and that are computed anew: no weights.
TABLES = re.compile(
    r"inv_freq$|(?:causal|masked|attn|attention)\.?_?(?:bias|mask)$|position_ids$|_extra_state$|\.version$"
)
# Parts of models of several modes that a class for text alone leaves out.
TOWERS = re.compile(r"(^|\.)(vision_\w+|visual|audio_\w+|multi_modal_projector|mm_projector|embed_(vision|audio))\.")
WRAPPERS = ("module.", "_orig_mod.")
# Entries that transformers reads as the name of an implementation: its own, or that of a hub, as in kernels-community/flash-attn.
KERNELS = ("_attn_implementation", "_experts_implementation")
PLAIN = re.compile(r"\w+")
# Types that hold weights as they are, as safetensors calls them.
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def require_language_model(source: str, config: Any) -> None:
    """Raises ModelError: the configuration is of no decoder-only language model that transformers knows, or asks for a program."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    _require_no_kernels(source, config)
    name, known = config.model_type, AutoModelForCausalLM
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder:
        raise ModelError(
            f"{source}: {name} is an encoder-decoder; expected a decoder-only language model, as GPT or Llama"
        )
    if remote or type(config) in known._model_mapping:
        return
    if type(config) in AutoModelForImageTextToText._model_mapping:
        raise ModelError(
            f"{source}: {name} is a vision-language model, which minidpo does not train; expected a language model alone "
            "(its text part saved by itself, if there is one)"
        )
    raise ModelError(
        f"{source}: {name} is no causal language model that transformers knows; expected one, as GPT or Llama"
    )


def _require_no_kernels(source: str, config: Any) -> None:
    """Raises ModelError: config.json names a program of a hub for the attention or the experts, which transformers would run."""
    for each in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
        for name in KERNELS:
            named = getattr(each, name, None)
            if strange := sorted(str(value) for value in _values(named) if not PLAIN.fullmatch(str(value))):
                raise ModelError(
                    f"{source}: its config.json says {name} {strange[0][:80]!r}, a program from a hub, which is not run; "
                    "remove the entry"
                )


def _values(named: Any) -> list[Any]:
    return [value for value in (named.values() if isinstance(named, dict) else [named]) if value is not None]


def require_whole(source: str, config: Any, model: nn.Module, info: dict[str, Any]) -> None:
    """Require that every weight of the model came from its files, and that every weight in them has its place.

    config: as its files have it. info: the loading info of `from_pretrained`.

    Raises:
        ModelError: weights are missing, left over, of another shape, or stored in a form that needs scales.
    """
    kind, classes = type(model).__name__, getattr(config, "architectures", None) or [type(model).__name__]
    named = classes if isinstance(classes, str) else classes[0]
    origin = f" (its config.json says {named})" if named != kind else ""
    wide = [
        f"{name} is {tuple(has)}, config.json says {tuple(due)}" for name, has, due in sorted(info["mismatched_keys"])
    ]
    missing = sorted(info["missing_keys"])
    is_part = named != kind and config.get_text_config() is not config
    left = sorted(
        key for key in info["unexpected_keys"] if not (TABLES.search(key) or (is_part and TOWERS.search(key)))
    )
    if left and all(key.startswith(WRAPPERS) for key in left):
        raise ModelError(
            f"{source}: its weights are named {listed(left)}: saved from inside a wrapper; expected names without "
            f"{' or '.join(WRAPPERS)}: save with the inner model's save_pretrained"
        )
    problems = wide[:1]
    if missing:
        problems.append(f"{len(missing)} of {kind}'s weights are not in its files ({listed(missing)})")
    if left:
        problems.append(f"{len(left)} in its files have no place in {kind} ({listed(left)})")
    if problems:
        raise ModelError(
            f"{source}{origin}: {'; '.join(problems)}. Expected a whole causal language model, and no more"
        )
    require_language_model(source, model.config)
    if info["error_msgs"]:
        raise ModelError(f"{source}: {' '.join(str(info['error_msgs'][0]).split())[:300]}")
    says_how = getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False)
    if not says_how:
        _require_floats(source, model)


def _require_floats(source: str, model: nn.Module) -> None:
    """Raises ModelError: a weight is stored in a quantized type, and the config does not say how it was quantized."""
    weights = {name for name, _ in model.named_parameters()}
    for name, dtype in sorted(_stored(_folder(source)).items()):
        if dtype not in TYPES.values() and (name in weights or dtype.startswith("F")):
            raise ModelError(
                f"{source}: {name} is stored as {dtype}, and config.json has no quantization_config that says how to read it; "
                "expected weights in bfloat16, float16 or float32"
            )


def require_finite(weights: Iterable[tuple[str, torch.Tensor]], whose: str) -> None:
    """Require that no weight is NaN or infinite.

    Raises:
        ModelError: some are; the first are named.
    """
    broken = [name for name, weight in weights if weight.is_floating_point() and not weight.isfinite().all()]
    if broken:
        raise ModelError(
            f"{whose}: NaN or infinity in {len(broken)} of its weights ({listed(broken)}); expected numbers: their training "
            "diverged, or the file is damaged"
        )


def beside_text(model: Any) -> list[str]:
    """The names of a model's parameters that text never reaches: a vision tower and the like, in a model of several modes."""
    if model.config.get_text_config() is model.config:
        return []
    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    reached = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    return sorted(name for name, weight in model.named_parameters() if id(weight) not in reached)


def left_out(source: str, model: Any) -> str | None:
    """A line on weights that are not used, such as a vision tower, by design of the model's class; None: all are."""
    if beside := beside_text(model):
        return (
            f"{source}: only the language model of {type(model).__name__} is used; {len(beside)} other weights "
            f"({listed(beside)}) are kept as they are, not trained"
        )
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    patterns.append(TOWERS)
    own = set(model.state_dict())
    names = sorted(
        name
        for name in _stored(_folder(source))
        if name not in own and not TABLES.search(name) and any(pattern.search(name) for pattern in patterns)
    )
    if not names:
        return None
    return (
        f"{source}: {len(names)} weights in its files are no part of {type(model).__name__} ({listed(names)}): they are not "
        "used, and the policy is saved without them"
    )


def _folder(source: str) -> Path:
    """The directory of a model's files: the source itself, or where the hub's copy of it lies."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists() or is_path(source):
        return Path(source)
    config = try_to_load_from_cache(source, "config.json")
    return Path(config).parent if isinstance(config, str) else Path(source)


def _stored(directory: Path) -> dict[str, str]:
    """The names of the weights in the files of a directory, with their types as safetensors calls them; empty if it has none."""
    from safetensors import safe_open

    stored: dict[str, str] = {}
    for file in _files(directory, "model.safetensors"):
        with safe_open(file, "pt") as opened:
            stored |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  # no mapping
    for file in [] if stored else _files(directory, "pytorch_model.bin"):
        # no weight is read: the form before torch 1.6 cannot be mapped
        held = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
        stored |= {name: _type_of(weight) for name, weight in held.items()}
    return stored


def _type_of(weight: torch.Tensor) -> str:
    """The type of a tensor as safetensors calls it; torch's name for one that holds no plain weights."""
    return TYPES.get(weight.dtype) or str(weight.dtype).removeprefix("torch.").upper()


def _files(directory: Path, name: str) -> list[Path]:
    """The file of this name; where there is none, those that its index lists. transformers prefers it too.

    Raises:
        ModelError: the index cannot be read.
    """
    if (directory / name).is_file():
        return [directory / name]
    index = directory / f"{name}.index.json"
    listed_files = read_json(index, ModelError).get("weight_map", {})
    if not isinstance(listed_files, dict):
        raise ModelError(f"{index}: weight_map: expected names of files, got {str(listed_files)[:40]!r}")
    return [
        file for file in (directory / each for each in sorted(set(map(str, listed_files.values())))) if file.is_file()
    ]
