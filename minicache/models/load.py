"""Loading and saving a model of any family: a Hugging Face directory or hub id, a .gguf file, a MiniMind .pth, an adapter."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from minicache.data.tokenizer_files import copy_to_policy, write_template
from minicache.disk import folder_written_whole
from minicache.errors import ModelError, fits
from minicache.failures import system_error
from minicache.models import huggingface, lora, minimind, precision, quantized, saved_config, tokenizers
from minicache.models.adapter_files import ADAPTER, settings_of
from minicache.models.adapter_places import adapter_place, base_name, own_template, tokenizer_place
from minicache.models.file_kinds import require_file
from minicache.models.fingerprint import fingerprint
from minicache.models.held import hold
from minicache.models.joined import Below, change_of
from minicache.models.merging import merge
from minicache.models.whole import left_out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in the precision it was stored in, on the CPU, in eval mode.

    model: a transformers model. source: its name, as the user gave it. below: of a base with adapters merged into it. notes: lines
    on what of the source was not used. quantization: in which its linear layers are held, though they are not stored so; a name in
    `QUANTIZATIONS` or "". weights: the digest of the weights, where the model does not show it any more.
    """

    model: nn.Module
    source: str
    below: Below | None = None
    notes: tuple[str, ...] = ()
    quantization: str = ""
    weights: str | None = None

    @property
    def family(self) -> str:
        """The architecture: transformers' `model_type`."""
        config: Any = self.model.config
        return str(config.model_type)

    @property
    def attention(self) -> str:
        """The attention implementation that transformers chose: sdpa, or eager for a family without it."""
        config: Any = self.model.config
        return str(config.get_text_config()._attn_implementation)

    @property
    def vocabulary(self) -> int:
        """Number of token embeddings."""
        model: Any = self.model
        return int(model.get_input_embeddings().num_embeddings)

    @property
    def left_out(self) -> str | None:
        """A line for the user on what of its files is not used; None: all is."""
        place, _ = split_source(self.below.base if self.below else self.source)
        lines = [*self.notes, left_out(place, self.model)]
        return "; ".join(filter(None, lines)) or None

    def note_left_out(self, note: Callable[[str], None]) -> None:
        """Tell a user what of its files is not used, if anything is not."""
        if line := self.left_out:
            note(line)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the weights and settings; see `minicache.models.fingerprint`."""
        digest = self.weights or fingerprint(self.model)
        log.debug("%s: digest of the weights %s", self.source, digest)
        return digest


# What to try where a model does not fit in memory.
TO_LOAD = "a machine with more memory, fewer processes on it (--parallel fsdp loads a model once), or a smaller model"
# What loads a file, given the path and the options behind the colon of its name: the model, and lines on what it did not use.
Loader = Callable[[Path, str], tuple[nn.Module, tuple[str, ...]]]
# Suffix of a file -> its loader. Any other source is a Hugging Face directory or hub id.
FAMILIES: dict[str, Loader] = {".pth": minimind.load, ".pt": minimind.load}


def split_source(source: str) -> tuple[str, str]:
    """The path and the options in a model's name: "a.pth:heads=16" -> ("a.pth", "heads=16")."""
    suffixes = "|".join(re.escape(suffix) for suffix in FAMILIES)
    found = re.fullmatch(rf"(.+(?:{suffixes})):(.*)", source, re.DOTALL)
    return (found[1], found[2]) if found else (source, "")


def lasting_name(source: str) -> str:
    """A name of the model that holds from any working directory: a path becomes absolute, a hub id stays as it is."""
    place, options = split_source(source)
    return f"{Path(place).resolve()}{':' if options else ''}{options}" if Path(place).exists() else source


def load_model(source: str, trust_remote_code: bool = False, quantization: str = "") -> LoadedModel:
    """The model in a directory, hub id, .gguf file or MiniMind .pth file; for an adapter, its base with it merged, float32.

    The name of a .pth file can carry settings that the file lacks: "model.pth:heads=16,kv_heads=8" (see `minimind.Options`).
    quantization: hold the linear layers in it, a name in `QUANTIZATIONS`. An adapter that was trained on a quantized base is not
    merged: the model is that base with the adapter on it.

    Raises:
        ModelError: the source does not exist, is of no known kind, needs code of its own that was not allowed, or does not fit
            its name. FullMemory: it does not fit in memory.
    """
    with fits(f"loading {source}", TO_LOAD):
        return _load(source, trust_remote_code, quantization)


def _load(source: str, trust_remote_code: bool, quantization: str) -> LoadedModel:
    started = time.perf_counter()
    place, options = split_source(source)
    path, below, notes = Path(place), None, tuple[str, ...]()
    if adapter := adapter_place(source):
        model, below, notes = _adapted(adapter, trust_remote_code)
    elif path.suffix not in FAMILIES:
        model = huggingface.load(source, trust_remote_code)
    else:
        require_file(path)
        model, notes = FAMILIES[path.suffix](path, options)
    weights = hold(model, source, quantization)
    _log_loaded(model, source, time.perf_counter() - started)
    return LoadedModel(model.eval().requires_grad_(False), source, below, notes, quantization, weights)


def load_unquantized(source: str, trust_remote_code: bool = False) -> LoadedModel:
    """As `load_model`, with plain weights: an adapter of a quantized base is merged into that base's weights before quantization.

    Weights that are stored quantized are turned back into float32, which cannot restore what they were before.

    Raises:
        ModelError: as `load_model`.
    """
    with fits(f"{source} without quantization", TO_LOAD):
        if adapter := adapter_place(source):
            model, below, notes = _adapted(adapter, trust_remote_code, as_plain=True)
            return LoadedModel(model.eval().requires_grad_(False), source, below, notes)
        return LoadedModel(quantized.plain(load_model(source, trust_remote_code).model), source)


def _adapted(
    directory: Path, trust_remote_code: bool, as_plain: bool = False
) -> tuple[nn.Module, Below | None, tuple[str, ...]]:
    """The base model with the adapter in `directory` merged into it, float32, what the two are, and the notes on the base.

    On a quantized base the adapter stays an adapter. as_plain: merge it, into the weights before quantization.

    Raises:
        ModelError: the base cannot be loaded, or is not the one that the adapter was trained on.
    """
    base = base_name(directory)
    settings_of(directory)
    try:
        loaded = load_model(base, trust_remote_code, "" if as_plain else lora.quantization_of(directory))
    except ModelError as error:
        raise ModelError(
            f"{directory}: the base model of this adapter, base_model_name_or_path in {ADAPTER}: {error}"
        ) from error
    lora.check_base(directory, base, loaded.fingerprint)
    if hasattr(loaded.model, "get_base_model"):
        raise ModelError(
            f"{directory}: its base {base} is an adapter on a quantized base; expected one that `minidpo export` has merged"
        )
    below = loaded.below or Below(lasting_name(base), loaded.fingerprint, {})
    model = quantized.plain(loaded.model) if as_plain else loaded.model
    adapted = lora.with_adapter(precision.to_float32(model, torch.device("cpu")), directory)
    if quantized.is_quantized(model):
        return adapted, None, loaded.notes
    below = below.plus(change_of(adapted))
    return merge(adapted, directory), below, loaded.notes


def _log_loaded(model: nn.Module, source: str, seconds: float) -> None:
    if log.isEnabledFor(logging.DEBUG):
        parameters = list(model.parameters())
        dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))
        count = sum(map(quantized.weight_count, parameters))
        log.debug("%s: %s, %s, %d parameters, %.1f s", source, type(model).__name__, dtypes, count, seconds)


def save_model(model: Any, tokenizer_dir: Path, directory: Path, weights: dict[str, Any] | None = None) -> None:
    """Write a complete Hugging Face directory: weights (or the adapter's) in safetensors, config, tokenizer. Whole or not at all.

    weights: the gathered weights of a sharded model.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    huggingface.quiet()
    # otherwise peft asks the hub whether the base's embeddings were resized, which they never are
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
    with folder_written_whole(directory) as draft:
        try:
            model.save_pretrained(draft, **options, **({"state_dict": _tied(model, weights)} if weights else {}))
        except SafetensorError as error:
            raise system_error(error, draft) from error
        saved_config.complete(draft / "config.json", model)
        lora.write_base(model, draft)
        copy_to_policy(tokenizer_dir, draft, alone=hasattr(model, "get_base_model"))


def _tied(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Gathered weights with those that are one parameter of the model as one tensor again: each is gathered by itself.

    By this transformers sees that they are tied, and writes them once.
    """
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return {name: weights.get(names.get(name, name), weight) for name, weight in weights.items()}


def save_tokenizer(
    source: str, directory: Path, chat_template: str | None, trust_remote_code: bool = False, model_type: str = ""
) -> None:
    """Write the files of the tokenizer at `source`; `chat_template`, if given, replaces its own template.

    An adapter without a tokenizer has that of its base, with the adapter's own chat template if there is one.
    model_type: that of the model to whose policy the files go; see `minicache.models.tokenizers`.

    Raises:
        ModelError: there is no tokenizer at `source`, or it cannot be written as one that does the same.
    """
    adapter = adapter_place(source)
    source = tokenizer_place(source)
    place, _ = split_source(source)
    if Path(place).suffix in FAMILIES:
        raise ModelError(
            f"{place}: a .pth file holds no tokenizer; add --tokenizer DIR (MiniMind's lies in its model/ folder)"
        )
    tokenizers.save_tokenizer(source, directory, trust_remote_code, model_type)
    if chat_template is None and adapter:
        chat_template = own_template(adapter)
    if chat_template is not None:
        write_template(directory, chat_template)
