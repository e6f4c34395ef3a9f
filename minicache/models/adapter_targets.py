"""The modules of a model that `--lora-targets` names."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import nn

from minicache.errors import ConfigError
from minicache.models.whole import beside_text

# Families whose out_proj peft refuses to adapt (peft/tuners/tuners_utils.py, _check_lora_target_modules_mamba).
MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
# Where classes of model families are defined; the second holds those of a checkpoint's own code.
FAMILY_CODE = ("transformers.models.", "transformers_modules.")


def targets(model: nn.Module, asked: str, lost: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a LoRA configuration that name its modules, checked: peft ignores an unknown name among known ones.

    asked: "all-linear", or names as peft takes them: the end of a module's name (`q_proj`, `self_attn.q_proj`) or the whole.
    lost: names of modules that all-linear must leave out.
    The weights of stacked experts are no modules; such a name becomes a target parameter. The names that single experts had in
    earlier transformers (Mixtral's w1) are peft's to convert. Modules that text never reaches (a vision tower's) are left out.

    Raises:
        ConfigError: the model has no such module that text reaches, or its weights are those of another one too.
    """
    if asked == "all-linear":
        return {"target_modules": asked, "exclude_modules": [*_left_out(model), *lost] or None}
    beside = beside_text(model)
    owners = {name.rpartition(".")[0] for name in beside}
    modules = {name: each for name, each in model.named_modules() if _is_adaptable(each) and name not in owners}
    experts = [
        name
        for name, weight in model.named_parameters()
        if weight.ndim == 3 and "experts" in name and name not in beside
    ]
    named = [name.strip() for name in asked.split(",") if name.strip()]
    if "all-linear" in named:
        raise ConfigError(
            f"--lora-targets {asked}: all-linear names all of them; expected it alone, or names of modules"
        )
    if not named:
        raise ConfigError("--lora-targets: expected all-linear, or names of modules such as q_proj,v_proj, got nothing")
    earlier = _earlier_names(model)
    strange = [name for name in named if not any(_ending_in(name, all_) for all_ in (modules, experts, earlier))]
    if strange:
        known = sorted({name.rpartition(".")[2] for name in [*modules, *experts, *earlier]})
        raise ConfigError(
            f"--lora-targets: the model has no linear modules {'that text reaches ' if beside else ''}named "
            f"{', '.join(strange)}; expected all-linear, or some of {', '.join(known)}"
        )
    chosen = [name for each in named for name in _ending_in(each, modules)]
    _require_untied(model, chosen)
    parameters = [name for name in named if not _ending_in(name, modules) and _ending_in(name, experts)]
    found: dict[str, Any] = {"target_modules": [name for name in named if name not in parameters]}
    if left_out := sorted({owner for name in named for owner in _ending_in(name, owners)}):
        found["exclude_modules"] = left_out
    if parameters:
        found["target_parameters"] = parameters
    if chosen and all(type(modules[name]).__name__ == "Conv1D" for name in chosen):
        # GPT-2's layers hold their weights transposed
        found["fan_in_fan_out"] = True
    return found


def _left_out(model: Any) -> list[str]:
    """The linear modules that all-linear leaves out, beside the head: those that an adapter would break, or text never reaches.

    What a family's own code makes of a linear layer (a router, a grouped projection) may compute more than its product. Mamba's
    kernels read the weights of some projections past the module; peft refuses them.
    An adapter on one of several modules with the same weights cannot be merged.
    """
    beside = {name.rpartition(".")[0] for name in beside_text(model)} | {name for name, _ in _tied(model)}
    fused = model.config.get_text_config().model_type in MAMBA_TYPES
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # one of each kind
    odd = {kind for kind, module in {type(each): each for each in linear.values()}.items() if _does_more(module)}
    return [
        name
        for name, module in linear.items()
        if name in beside or type(module) in odd or (fused and name.rpartition(".")[2] == "out_proj")
    ]


def _does_more(module: nn.Linear) -> bool:
    """Whether a family's own kind of linear layer computes something else than the product with its weights."""
    if type(module).forward is nn.Linear.forward or not type(module).__module__.startswith(FAMILY_CODE):
        return False
    # with other numbers: the model may have none, and a half precision would round the two in different ways
    module = deepcopy(module).float().to_empty(device="cpu")
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        row = torch.ones(2, module.in_features)
        try:
            found: Any = module(row)
        # a family's own code may raise anything
        except Exception:
            return True
        product = nn.functional.linear(row, module.weight, module.bias)
    return not (isinstance(found, torch.Tensor) and found.shape == product.shape and torch.allclose(found, product))


def _is_adaptable(module: nn.Module) -> bool:
    """Whether peft has LoRA for this kind of module."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _earlier_names(model: Any) -> list[str]:
    """Names of experts' layers in earlier transformers, which peft converts for this family."""
    try:
        conversion = import_module("peft.utils.transformers_weight_conversion")
        pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
        return list(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))
    # another version of peft
    except (ImportError, AttributeError):
        return []


def _ending_in(name: str, names: Any) -> list[str]:
    """The names that are this one, or end in it after a dot."""
    return [each for each in names if each == name or each.endswith(f".{name}")]


def _tied(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each module whose weights are those of another one too, with the other."""
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0])
    for names in owners.values():
        for name in names:
            yield from ((name, other) for other in names[:2] if other != name)


def _require_untied(model: nn.Module, chosen: list[str]) -> None:
    """Raises ConfigError: a chosen module shares its weights with another one."""
    for name, other in _tied(model):
        if name in chosen:
            raise ConfigError(
                f"--lora-targets: {name} has the same weights as {other} (they are tied), and an adapter would change one use of "
                "them alone; leave it out"
            )
