"""Low-rank adapters through peft: the base stays frozen, the adapter is small (Hu et al. 2021, LoRA, arXiv:2106.09685)."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.errors import ConfigError, ModelError
from minicache.models.quantized import to_float32
from minicache.options.base import QUANTIZATIONS
from minicache.options.train import LoraOptions

ADAPTER, BASE = "adapter_config.json", "base.json"


def add_lora(model: nn.Module, source: str, options: LoraOptions, seed: int) -> nn.Module:
    """The model with new adapters, whose second factor is zero, so that they change nothing yet.

    There is no dropout: both stages run in eval mode. source: the name of the base, which the adapter's file records.

    Raises:
        ConfigError: peft is not installed, or the model has no such modules.
    """
    peft = _peft()
    named = _targets(model, options.lora_targets)
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules=named,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return adapt(model, config, source)


def adapt(model: nn.Module, config: Any, source: str) -> nn.Module:
    """The model with the adapters of a peft configuration, which records `source` as the base."""
    with _quiet():
        adapted: Any = _peft().get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = source
    assert isinstance(adapted, nn.Module)
    return adapted


def _targets(model: nn.Module, asked: str) -> str | list[str]:
    """'all-linear', or the names of modules, checked: peft ignores an unknown name among known ones.

    Raises:
        ConfigError: the model has no linear module of a name.
    """
    if asked == "all-linear":
        return asked
    linear = sorted({name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
    named = [name.strip() for name in asked.split(",") if name.strip()]
    strange = [name for name in named if name not in linear]
    if strange or not named:
        raise ConfigError(
            f"--lora-targets: the model has no linear modules named {', '.join(strange) or 'so'}; expected all-linear, or "
            f"some of {', '.join(linear)}"
        )
    return named


def base_of(directory: Path) -> str | None:
    """The name of the base model in an adapter's directory; None if the directory holds no adapter.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    file = directory / ADAPTER
    try:
        name: str | None = (
            json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else None
        )
        return name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read as an adapter's configuration: {error}") from error


def write_base(model: nn.Module, directory: Path) -> None:
    """Write the digest of the base's weights beside an adapter that has it (`base_fingerprint`): a name may change its weights.

    With it the quantization of the base (`base_quantization`), if it was not held as it is stored.
    """
    if base := getattr(model, "base_fingerprint", None):
        quantization = getattr(model, "base_quantization", "")
        facts = {"weights": base} | ({"quantization": quantization} if quantization else {})
        (directory / BASE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def quantization_of(directory: Path) -> str:
    """The quantization of the base that an adapter was trained on, a name in QUANTIZATIONS; "" for a base as it is stored.

    Raises:
        ModelError: the adapter's file about its base cannot be read.
    """
    file = directory / BASE
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("quantization", "") if file.is_file() else ""
        if name and name not in QUANTIZATIONS:
            raise ValueError(f"quantization: expected one of {', '.join(QUANTIZATIONS)}, got {name!r}")
        return str(name)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


def check_base(directory: Path, name: str, fingerprint: str) -> None:
    """Require that `fingerprint`, of the model that the base's name now means, is that of the adapter's base.

    Raises:
        ModelError: the adapter was trained on other weights.
    """
    file = directory / BASE
    try:
        expected = json.loads(file.read_text(encoding="utf-8"))["weights"] if file.is_file() else fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if expected != fingerprint:
        raise ModelError(
            f"{directory}: an adapter of weights {expected}, but {name} now has {fingerprint}; expected the same. Put them back, "
            f"or write their path to base_model_name_or_path in {ADAPTER}"
        )


def with_adapter(base: nn.Module, directory: Path) -> Any:
    """The base with its adapter, float32, trainable; its `merge_and_unload()` makes one model of them.

    Raises:
        ModelError: the adapter does not fit the base.
        ConfigError: peft is not installed.
    """
    peft = _peft()
    try:
        with _quiet():
            return peft.PeftModel.from_pretrained(to_float32(base, torch.device("cpu")), directory, is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        line = " ".join(str(error).split())[:300]
        raise ModelError(f"{directory}: the adapter does not fit its base model: {line}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide two warnings that a user cannot act on.

    peft 0.21 reads an attribute that transformers 5.23 deprecates, and matches ranks against modules although it sets those of
    stacked experts itself.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, message=r".*_pattern keys did not match.*gate_up_proj"
        )
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need another package: pip install 'minidpo[lora]'") from None
    return peft
