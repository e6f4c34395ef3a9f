"""One door to all families: which loader a source needs, what it gives, how it is saved again."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint

from minicache.data.tokenizers import copy_tokenizer
from minicache.disk import folder_written_whole
from minicache.errors import ModelError
from minicache.models import huggingface, lora, minimind
from minicache.models.fingerprint import fingerprint


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in the precision it was stored in, on the CPU, in eval mode.

    source: what the user named. family: the architecture (transformers' `model_type`).
    """

    model: nn.Module
    source: str

    @property
    def family(self) -> str:
        return self.model.config.model_type  # type: ignore[union-attr, return-value]

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    @cached_property
    def fingerprint(self) -> str:
        """See `minicache.models.fingerprint`."""
        return fingerprint(self.model)


# suffix of a file -> its loader, given the file and what the name says behind a colon; anything else is a Hugging Face
# directory or hub id
FAMILIES: dict[str, Callable[[Path, str], nn.Module]] = {".pth": minimind.load, ".pt": minimind.load}


def split_source(source: str) -> tuple[str, str]:
    """A model's name as the place it lies at and what is said behind the colon: "a.pth:heads=16" -> ("a.pth", "heads=16")."""
    suffixes = "|".join(re.escape(suffix) for suffix in FAMILIES)
    found = re.fullmatch(rf"(.+(?:{suffixes})):(.*)", source, re.DOTALL)
    return (found[1], found[2]) if found else (source, "")


def lasting_name(source: str) -> str:
    """A model's name under which it is found from any working directory: a path made absolute, a hub id as it is."""
    place, said = split_source(source)
    return f"{Path(place).resolve()}{':' if said else ''}{said}" if Path(place).exists() else source


def load_model(source: str, trust_remote_code: bool = False) -> LoadedModel:
    """Load a model directory, hub id, .gguf file or MiniMind .pth file; an adapter's directory as its base with it merged, float32.

    What a .pth file does not carry can be said in its name: "model.pth:heads=16,kv_heads=8" (see `minimind.Options`).

    Raises:
        ModelError: it does not exist, is of no known kind, needs code of its own that was not allowed, or is not what its name
            says.
    """
    place, options = split_source(source)
    path = Path(place)
    if base := lora.base_of(path):
        try:
            below = load_model(base, trust_remote_code)
        except ModelError as error:
            raise ModelError(
                f"{place}: the model that this adapter belongs to: {error}; base_model_name_or_path in {lora.ADAPTER} says where"
            ) from error
        lora.check_base(path, base, below.fingerprint)
        merged = lora.with_adapter(below.model, path).merge_and_unload()
        return LoadedModel(merged.eval().requires_grad_(False), source)
    if path.suffix in FAMILIES:
        if not path.is_file():
            raise ModelError(f"{place}: no such file")
        model = FAMILIES[path.suffix](path, options)
    else:
        model = huggingface.load(source, trust_remote_code)
    return LoadedModel(model.eval().requires_grad_(False), source)


def save_model(model: Any, tokenizer_dir: Path, directory: Path, weights: dict[str, Any] | None = None) -> None:
    """Write a complete Hugging Face directory: weights (or the adapter's) in safetensors, config, tokenizer. Whole or not at all.

    weights: those of a model in shards, gathered.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    huggingface.quiet()
    # peft would ask the hub whether the base's embeddings were resized; they never are
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
    with folder_written_whole(directory) as draft:
        try:
            model.save_pretrained(draft, **options, **({"state_dict": weights} if weights else {}))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        lora.write_base(model, draft)
        copy_tokenizer(tokenizer_dir, draft)


def save_tokenizer(source: str, directory: Path, chat_template: str | None, trust_remote_code: bool = False) -> None:
    """Write the files of the tokenizer at `source`, with `chat_template` in place of its own if given.

    Raises:
        ModelError: there is no tokenizer at `source`, or it has no fast version.
    """
    place, _ = split_source(source)
    if Path(place).suffix in FAMILIES:
        raise ModelError(
            f"{place}: a .pth file holds no tokenizer; add --tokenizer DIR (MiniMind's lies in its model/ folder)"
        )
    huggingface.save_tokenizer(source, directory, trust_remote_code)
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, as far as its code marks them; without their parts."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(model: nn.Module) -> None:
    """Keep a decoder layer's input only, and compute the rest again in backward (Chen et al. 2016, arXiv:1604.06174).

    transformers' own switch works in train mode alone, and that would turn dropout on.
    """
    layers = layers_of(model)
    if not layers:
        raise ModelError("--activation-checkpointing: this model's code has no layers that say they can; leave it off")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
