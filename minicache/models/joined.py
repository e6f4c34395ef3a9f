"""Adapters on adapters: a run may train one on a reference that is itself a base with adapters merged into it.

Other programs know one adapter on one base. So the run saves, as one LoRA adapter of the true base, the sum of all: a change
s1 * B1 A1 + s2 * B2 A2 is s2 * [s1/s2 B1, B2] [A1; A2], of rank r1 + r2. The factors that the run trains stay as they are, bit
for bit, as the last rows and columns, so that checkpoints can be resumed. Adapters that are not such sums (DoRA, whole layers, ...)
are saved on a merged base, which the run writes beside them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minicache.errors import ModelError
from minicache.models.adapter_files import PREFIX
from minicache.models.peft_library import library
from minicache.text import one_line

WEIGHTS = "adapter_model.safetensors"
# The names of a module's factors in an adapter's file: those of linear layers, those of embeddings.
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
# Settings of LoRA that leave a plain sum of products where they have these values or say nothing.
PLAIN: Mapping[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}
UNUSED = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "lora_bias",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)


class Factors(NamedTuple):
    """The change scale * B A of one module. a: (rank, inputs). b: (outputs, rank). names: of both in an adapter's file."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    names: tuple[str, str]


Change = dict[str, Factors]


@dataclass(frozen=True)
class Below:
    """What lies below a reference that holds adapters.

    base: the name of the true base. weights: the digest of its weights as they are stored. change: the sum of the adapters, by
    module; None if they are no such sum.
    """

    base: str
    weights: str
    change: Change | None

    def plus(self, change: Change | None) -> "Below":
        """The same with the change of one more adapter."""
        return replace(self, change=None if self.change is None or change is None else join(self.change, change))


def change_of(adapted: Any) -> Change | None:
    """The change that an adapted model's adapter makes, as a sum of products; None if it is no such sum."""
    config = adapted.peft_config["default"]
    says = [name for name in UNUSED if getattr(config, name, None)]
    says += [name for name, plain in PLAIN.items() if getattr(config, name, None) not in plain]
    if config.peft_type.value != "LORA" or says or getattr(adapted, "kept_weights", None):
        return None
    state = library().get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found: Change = {}
    for name, module in adapted.named_modules():
        for names in PAIRS:
            keys = [f"{name}.{each}" for each in names]
            if keys[0] in state:
                a, b = (state.pop(key).detach().float().cpu().clone() for key in keys)
                found[name.removeprefix(PREFIX)] = Factors(a, b, float(module.scaling["default"]), names)
    return None if state else found


def join(first: Change, second: Change) -> Change:
    """The sum of two changes. The factors of the second are in it as they are, last."""
    both = {**first, **second}
    for name in first.keys() & second.keys():
        one, two = first[name], second[name]
        a, b = torch.cat([one.a, two.a]), torch.cat([one.b * (one.scale / two.scale), two.b], dim=1)
        both[name] = Factors(a, b, two.scale, two.names)
    return both


def write_joined(model: Any, below: Below, directory: Path) -> None:
    """Replace the adapter that a model has saved in a directory by its sum with those below it, on the true base."""
    assert below.change is not None
    state = load_file(directory / WEIGHTS)
    change = join(below.change, _in_file(model, state))
    tensors = {
        f"{PREFIX}{name}.{key}": tensor.contiguous()
        for name, each in change.items()
        for key, tensor in zip(each.names, each[:2], strict=True)
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = _config(model, change, below.base)
    config.save_pretrained(str(directory))


def restore(adapted: Any, directory: Path) -> None:
    """Load the factors of a model's own adapter from a joined one, of which they are the last rows and columns.

    Raises:
        ModelError: it cannot be read, or holds no such factors.
    """
    peft = library()
    mine = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    firsts = tuple(first for first, _ in PAIRS)
    try:
        state = load_file(directory / WEIGHTS)
        for key, value in mine.items():
            whole = state[key]
            mine[key] = whole[-len(value) :] if key.endswith(firsts) else whole[:, -value.shape[1] :]
        peft.set_peft_model_state_dict(adapted, mine)
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        line = one_line(error, 200)
        raise ModelError(f"{directory}: does not hold the adapter that this run trains: {line}") from error


def _in_file(model: Any, state: Mapping[str, torch.Tensor]) -> Change:
    """The change of the saved adapter of a model, whose own weights may lie in shards."""
    found: Change = {}
    for name, module in model.named_modules():
        for names in PAIRS:
            if f"{name}.{names[0]}" in state:
                a, b = (state[f"{name}.{each}"] for each in names)
                found[name.removeprefix(PREFIX)] = Factors(a, b, float(module.scaling["default"]), names)
    return found


def _config(model: Any, change: Change, base: str) -> Any:
    """The configuration of one adapter that makes a change: a rank and an alpha for most modules, patterns for the others."""
    ranks = {name: len(each.a) for name, each in change.items()}
    alphas = {name: _whole(each.scale * ranks[name]) for name, each in change.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    modules = dict(model.get_base_model().named_modules())
    kinds = {type(getattr(modules[name], "base_layer", modules[name])).__name__ for name in change}
    config = library().LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules=_shortest(list(change), list(modules)),
        fan_in_fan_out=kinds == {"Conv1D"},
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.base_model_name_or_path = base
    return config


def _shortest(names: list[str], modules: list[str]) -> list[str]:
    """The last parts of the names, if they mean just these modules; else the names."""
    last = {name.rpartition(".")[2] for name in names}
    meant = {module for module in modules if module.rpartition(".")[2] in last}
    return sorted(last if meant == set(names) else names)


def _whole(value: float) -> float:
    """The value, as an integer if it is one up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else value
