"""One door to all families: which loader a source needs, what it gives, how it is saved again."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint

from minicache.errors import ModelError, OutputError
from minicache.models import huggingface, lora, minimind


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
        """blake2b-128 over name, dtype, shape and bytes of every stored tensor; a tied one counts once.

        The same weights give the same digest whatever file, directory or name they came from.
        """
        unique: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in sorted(self.model.state_dict().items()):
            unique.setdefault(tensor.data_ptr(), (name, tensor))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(_tensor_digest, unique.values())
        return blake2b(b"".join(digests), digest_size=16).hexdigest()


def _tensor_digest(item: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = item
    state = blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.digest()


# suffix of a file -> its loader; anything else is a Hugging Face directory or hub id
FAMILIES: dict[str, Callable[[Path], nn.Module]] = {".pth": minimind.load, ".pt": minimind.load}


def load_model(source: str, trust_remote_code: bool = False) -> LoadedModel:
    """Load a model directory, hub id, .gguf file or MiniMind .pth file; an adapter's directory as its base with it merged, float32.

    Raises:
        ModelError: it does not exist, is of no known kind, or needs code of its own that was not allowed.
    """
    path = Path(source)
    if base := lora.base_of(path):
        merged = lora.with_adapter(load_model(base, trust_remote_code).model, path).merge_and_unload()
        return LoadedModel(merged.eval().requires_grad_(False), source)
    if path.suffix in FAMILIES:
        if not path.is_file():
            raise ModelError(f"{source}: no such file")
        model = FAMILIES[path.suffix](path)
    else:
        model = huggingface.load(source, trust_remote_code)
    return LoadedModel(model.eval().requires_grad_(False), source)


def save_model(model: Any, tokenizer_dir: Path, directory: Path) -> None:
    """Write a complete Hugging Face directory: weights (or the adapter's) in safetensors, config, tokenizer. Whole or not at all.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    draft = directory.with_name(f".{directory.name}.saving")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        # peft would ask the hub whether the base's embeddings were resized; they never are
        options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(draft, **options)
        shutil.copytree(tokenizer_dir, draft, dirs_exist_ok=True)
        draft.replace(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OutputError(f"{directory}: the model cannot be written: {error}") from error


def save_tokenizer(source: str, directory: Path, chat_template: str | None, trust_remote_code: bool = False) -> None:
    """Write the files of the tokenizer at `source`, with `chat_template` in place of its own if given.

    Raises:
        ModelError: there is no tokenizer at `source`, or it has no fast version.
    """
    if Path(source).suffix in FAMILIES:
        raise ModelError(
            f"{source}: a .pth file holds no tokenizer; add --tokenizer DIR (MiniMind's lies in its model/ folder)"
        )
    huggingface.save_tokenizer(source, directory, trust_remote_code)
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def checkpoint_activations(model: nn.Module) -> None:
    """Keep a decoder layer's input only, and compute the rest again in backward (Chen et al. 2016, arXiv:1604.06174).

    transformers' own switch works in train mode alone, and that would turn dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError("--activation-checkpointing: this model's code has no layers that say they can; leave it off")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
