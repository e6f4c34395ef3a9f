"""Reading a .pth: from a file of torch.save, however it was wrapped, to a flat state dict. No pickled code is ever run."""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minicache.errors import ModelError
from minicache.models.file_kinds import SAVE, require_torch_file
from minicache.models.generations import NOT_WEIGHTS, State
from minicache.text import one_line

# Keys under which programs keep the weights beside an optimizer and the like. Source: MiniMind's lm_checkpoint ("model"),
# Lightning ("state_dict"), the tutorials of PyTorch ("model_state_dict"), DeepSpeed ("module").
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "model_state", "weights")
DEEPEST = 3  # wrappers in each other
# Modules that torch puts around others: DDP and DataParallel around the whole, the others around any part.
OUTER = "module"
ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class PthFile:
    """The weights of a file, names without wrappers. notes: lines on what of the file was not used."""

    state: State
    notes: tuple[str, ...]


def read_pth(path: Path) -> PthFile:
    """The state dict in a file of torch.save, as plain tensors on the CPU.

    Raises:
        ModelError: it is no such file, holds more than plain data, or has no one state dict.
    """
    content, name, unused = _load(path), "", list[str]()
    for _ in range(DEEPEST):
        inner = _wrapped(content, path)
        if inner is None:
            break
        unused += [f"{name}{key}" for key in content if key != inner]
        content, name = content[inner], f"{name}{inner}."
    state = _plain_names(_tensors(content, name, path), path)
    _require_whole_weights(state, path)
    note = f"{path}: the weights are those of {name[:-1]!r}; not used: {', '.join(sorted(unused))}"
    return PthFile(state, (note,) if unused else ())


def _load(path: Path) -> Any:
    """The file's content. Only tensors, numbers, text and their collections, and argparse's plain record of options, are built."""
    is_zip = require_torch_file(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            # on pickle protocols other than 2
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: {_refusal(str(error))}") from error
    # torch may raise anything on a damaged file
    except Exception as error:
        line = one_line(error, 200)
        raise ModelError(f"{path}: cut off or damaged; copy or download the file again ({line})") from error


def _refusal(text: str) -> str:
    """Why torch's reader of plain data refuses a file."""
    if found := re.search(r"(?:GLOBAL|class|function) ([\w.]+) (?:was not|is not|whose)", text) or re.search(
        r"whose module (\S+) is blocked", text
    ):
        return f"holds objects of {found[1]}, and pickled code is never run; expected weights alone: {SAVE}"
    if re.search(r"Unsupported operand 1(4[0-9]|50)\b", text):
        return f"written with a newer pickle protocol, which cannot be read without running code; write it with {SAVE}"
    line = " ".join(text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].split())[:200]
    return f"holds more than weights, or is damaged (pickled code is never run); expected weights alone: {SAVE}: {line}"


def _wrapped(content: Any, path: Path) -> str | None:
    """The key of a dictionary under which the weights lie; None: they lie in the dictionary itself.

    Raises:
        ModelError: there are several, and nothing says which.
    """
    if not isinstance(content, Mapping) or any(isinstance(value, torch.Tensor) for value in content.values()):
        return None
    found = [key for key in WRAPPERS if isinstance(content.get(key), Mapping) and content[key]]
    if len(found) > 1:
        raise ModelError(
            f"{path}: weights under {' and '.join(map(repr, found))}; expected one state dict, as {SAVE} writes it"
        )
    return found[0] if found else None


def _tensors(content: Any, name: str, path: Path) -> State:
    where = f" under {name[:-1]!r}" if name else ""
    if not isinstance(content, Mapping):
        raise ModelError(f"{path}: a {type(content).__name__}{where}; expected a dict of tensors, as {SAVE} writes it")
    others = [key for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if len(others) == len(content) and content:
        some = ", ".join(str(key) for key in list(content)[:6])
        raise ModelError(
            f"{path}: no weights{where}: {some}; expected a dict of tensors, or one under {', '.join(WRAPPERS)}"
        )
    if others:
        kind = type(content[others[0]]).__name__
        raise ModelError(
            f"{path}: expected a dict of tensors{where}, as {SAVE} writes it; {others[0]!r} is of type {kind}"
        )
    # a Parameter would be trained, and saved, as one
    return {str(key): value.detach() for key, value in content.items()}


def _plain_names(state: State, path: Path) -> State:
    """The tensors by the names that they have in the model itself, without the modules that wrap it in training.

    Raises:
        ModelError: two become one.
    """
    plain: State = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        parts = [part for part in key.split(".") if part not in ANYWHERE]
        while parts[:1] == [OUTER] and len(parts) > 1:
            parts = parts[1:]
        name = ".".join(parts)
        if name in plain:
            raise ModelError(
                f"{path}: {origin[name]} and {key} are both {name} without the names of wrappers; expected one model"
            )
        plain[name], origin[name] = value, key
    return plain


def _require_whole_weights(state: State, path: Path) -> None:
    """Raises ModelError: LoRA matrices, tensors without numbers or with fewer than their shape says, or quantized ones."""
    ours, peft = ([key for key in state if re.search(part, key)] for part in (r"\.lora\.[AB]\.", r"\.lora_[ABE]\b"))
    if ours and len(ours) == len(state):
        raise ModelError(
            f"{path}: a LoRA file of MiniMind, {len(ours)} matrices without their base; merge it first: "
            "convert_merge_base_lora in MiniMind's scripts/convert_model.py"
        )
    if ours:
        raise ModelError(
            f"{path}: a model with LoRA matrices beside its weights, such as {ours[0]}; merge them first: merge_lora in "
            "MiniMind's model/model_lora.py"
        )
    if peft:
        raise ModelError(
            f"{path}: LoRA matrices of peft, such as {peft[0]}; save the adapter with save_pretrained and name its directory"
        )
    for key, value in state.items():
        if value.is_meta:
            raise ModelError(f"{path}: {key} is on the meta device and has no numbers; save the model after filling it")
        if value.layout != torch.strided:
            raise ModelError(f"{path}: {key} is a {value.layout} tensor; expected plain ones: .to_dense()")
        is_weight = value.is_floating_point() or key.endswith("weight")
        if value.is_quantized or (is_weight and value.dtype not in DTYPES):
            raise ModelError(
                f"{path}: {key} is {value.dtype}: expected weights that are not quantized; use the file from before that"
            )
        if key.endswith(NOT_WEIGHTS):
            continue
        if not value.dim() or not value.numel():
            raise ModelError(f"{path}: {key} has the shape {tuple(value.shape)}; expected a weight with numbers in it")
        if _size(value) > value.untyped_storage().nbytes():
            raise ModelError(
                f"{path}: {key} repeats few numbers as {tuple(value.shape)}; expected weights: .contiguous()"
            )
    needed, held = (
        sum(_size(value) for key, value in state.items() if not key.endswith(NOT_WEIGHTS)),
        path.stat().st_size,
    )
    # Loading copies each. A tied head is the embedding once more.
    if needed > 2 * held:
        raise ModelError(
            f"{path}: its weights overlap: {needed:,} bytes in a file of {held:,}; expected each by itself"
        )


def _size(weight: torch.Tensor) -> int:
    """Number of bytes of a weight by itself."""
    return weight.numel() * weight.element_size()
