"""Low-rank adapters through peft: the base stays frozen, the adapter is small (Hu et al. 2021, LoRA, arXiv:2106.09685)."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minicache.disk import read_json
from minicache.errors import ConfigError, ModelError
from minicache.models.adapter_files import ADAPTER, PREFIX, repeated, require_all, require_ranks, resize, settings_of
from minicache.models.adapter_targets import targets
from minicache.models.directories import broken_file
from minicache.models.joined import WEIGHTS, write_joined
from minicache.models.patterns import require_quick
from minicache.models.peft_library import library, quiet
from minicache.models.precision import seen_in_float32, to_float32
from minicache.models.whole import require_finite
from minicache.options.base import QUANTIZATIONS
from minicache.options.train import LoraOptions
from minicache.text import listed, one_line
from minicache.trackers import Tracker

BASE = "base.json"
# The entry of that file which says that the adapter holds others too (joined.py).
JOINED = "joined"


def add_lora(model: nn.Module, source: str, options: LoraOptions, seed: int, tracker: Tracker) -> nn.Module:
    """The model with new adapters, whose second factor is zero, so that they change nothing yet.

    There is no dropout: both stages run in eval mode. source: the name of the base, which the adapter's file records. all-linear
    leaves out what could not be read back from the saved adapter, and says so.

    Raises:
        ConfigError: peft is not installed, the model has no such modules, or those that are named could not be read back.
    """
    library()
    asked = options.lora_targets
    if options.lora_dora:
        # its magnitudes are computed from the weights, in every pass
        model = to_float32(model, next(model.parameters()).device)
    try:
        adapted = adapt(model, _config(options, targets(model, asked), seed), source)
        lost = _not_read_back(adapted)
        if lost and asked == "all-linear":
            tracker.note(
                f"--lora-targets all-linear leaves out {listed(lost)}: peft does not find their adapters again"
            )
            model = adapted.unload()
            adapted, lost = adapt(model, _config(options, targets(model, asked, lost), seed), source), []
    except (ValueError, TypeError, NotImplementedError) as error:
        line = one_line(error, 300)
        raise ConfigError(
            f"--lora-targets {asked}: peft cannot adapt this model so: {line}; expected names of other modules, such as "
            "q_proj,v_proj"
        ) from error
    if lost:
        raise ConfigError(
            f"--lora-targets {asked}: peft does not find the adapters of {listed(lost)} again in what it saves; expected names of "
            "other modules, or all-linear, which leaves them out"
        )
    assert isinstance(adapted, nn.Module)
    return adapted


def _config(options: LoraOptions, modules: dict[str, Any], seed: int) -> Any:
    """peft's configuration, for adapters whose first factor this seed makes."""
    torch.manual_seed(seed)
    return library().LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        use_rslora=options.lora_rslora,
        use_dora=options.lora_dora,
        task_type="CAUSAL_LM",
        **modules,
    )


def _not_read_back(adapted: Any) -> list[str]:
    """The modules whose adapters are saved under names that peft takes for others when it loads them.

    In 0.21 transformers' conversion of old names applies to new ones too.
    """
    peft = library()
    with quiet():
        saved = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = peft.set_peft_model_state_dict(adapted, saved).missing_keys
    return sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in missing if ".lora_" in key})


def adapt(model: nn.Module, config: Any, source: str) -> Any:
    """The model with float32 adapters of a peft configuration, which records `source` as the base."""
    # without a name, of which peft would warn that the model has another
    config = copy.copy(config)
    config.base_model_name_or_path = None
    with quiet(), seen_in_float32(model):
        adapted: Any = library().get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = source
    return adapted


def write_base(model: nn.Module, directory: Path) -> None:
    """Write the digest of the base's weights beside an adapter that has it (`base_fingerprint`): a name may change its weights.

    With it the quantization of the base (`base_quantization`), if it was not held as it is stored.
    """
    if base := getattr(model, "base_fingerprint", None):
        quantization = getattr(model, "base_quantization", "")
        facts = {"weights": base} | ({"quantization": quantization} if quantization else {})
        if below := getattr(model, "below", None):
            write_joined(model, below, directory)
            facts = {"weights": below.weights, JOINED: True}
        (directory / BASE).write_text(json.dumps(facts) + "\n", encoding="utf-8", newline="\n")
    if kept := getattr(model, "kept_weights", None):
        save_file({**load_file(directory / WEIGHTS), **kept}, directory / WEIGHTS, metadata={"format": "pt"})


def is_joined(directory: Path) -> bool:
    """Whether the adapter in a directory holds, beside the one that was trained, those that were below it.

    Raises:
        ModelError: the file about its base cannot be read.
    """
    return bool(_facts(directory).get(JOINED))


def quantization_of(directory: Path) -> str:
    """The quantization of the base that an adapter was trained on, a name in QUANTIZATIONS; "" for a base as it is stored.

    Raises:
        ModelError: the file about its base cannot be read.
    """
    name = _facts(directory).get("quantization", "")
    if name and name not in QUANTIZATIONS:
        raise ModelError(
            f"{directory / BASE}: cannot be read: quantization: expected one of {', '.join(QUANTIZATIONS)}, got {name!r}"
        )
    return str(name)


def _facts(directory: Path) -> dict[str, Any]:
    file = directory / BASE
    facts = read_json(file, ModelError)
    if file.is_file() and "weights" not in facts:
        raise ModelError(f"{file}: cannot be read: it names no weights")
    return facts


def check_base(directory: Path, name: str, fingerprint: str) -> None:
    """Require that `fingerprint`, of the model that the base's name now means, is that of the adapter's base.

    Raises:
        ModelError: the adapter was trained on other weights.
    """
    expected = _facts(directory).get("weights", fingerprint)
    if expected != fingerprint:
        raise ModelError(
            f"{directory}: an adapter of weights {expected}, but {name} now has {fingerprint}; expected the same. Put them back, "
            f"or write their path to base_model_name_or_path in {ADAPTER}"
        )


def with_adapter(base: nn.Module, directory: Path) -> Any:
    """The base with its adapter, which is float32 and trainable; the base too is float32 if more than its products are changed.

    Every weight in the adapter's file is in the model, and every weight of the adapter comes from the file; peft itself leaves
    out what does not fit, and invents what is missing. A base with fewer embeddings than the file is resized, as peft's users do.

    Raises:
        ModelError: the adapter does not fit the base.
        ConfigError: peft is not installed.
    """
    peft = library()
    config = settings_of(directory)
    require_quick(config, (name for name, _ in base.named_modules()), directory)
    if not any((directory / name).is_file() for name in (WEIGHTS, "adapter_model.bin")):
        raise ModelError(f"{directory}: no {WEIGHTS} in it; copy or download the adapter again")
    try:
        weights = peft.load_peft_weights(str(directory), device="cpu")
        require_finite(weights.items(), str(directory))
        require_ranks(config, weights, directory)
        with quiet():
            if not _only_adds(config, weights):
                base = to_float32(base, torch.device("cpu"))
            resize(base, weights, directory)
            kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
            with seen_in_float32(base):
                adapted = kind(base, config, "default")
            kept = _changed(adapted, weights)
            found = adapted.load_adapter(str(directory), "default", is_trainable=True)
    except ModelError:
        raise
    # peft may raise anything on a damaged file
    except Exception as error:
        if broken := broken_file(directory):
            raise ModelError(broken) from error
        line = one_line(error, 300)
        if "Weights only load failed" in line:
            raise ModelError(
                f"{directory}: adapter_model.bin holds more than tensors, which is never run; expected {WEIGHTS}"
            ) from error
        missing = isinstance(error, KeyError)
        problem = f"its file has no weights {line}" if missing else line
        raise ModelError(f"{directory}: the adapter does not fit its base model: {problem}") from error
    known = repeated(weights)
    require_all(directory, found.missing_keys, [key for key in found.unexpected_keys if key not in known])
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    adapted.kept_weights = {key: value for key, value in kept.items() if key not in own}
    return adapted


def _only_adds(config: Any, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the adapter computes with no weight of the base and replaces none: LoRA beside linear layers and embeddings."""
    kind, start = config.peft_type.value, config.init_lora_weights if hasattr(config, "init_lora_weights") else None
    factors = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")
    return (
        kind == "LORA"
        and start in (True, False, "gaussian")
        and not config.use_dora
        and all(any(factor in key for factor in factors) for key in weights)
    )


def _changed(adapted: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that replace others of the base, float32: resized embeddings. peft would save the adapter without them."""
    state = adapted.state_dict()
    values = {key: value.float() for key, value in weights.items() if key in state}
    return {key: value for key, value in values.items() if not torch.equal(value, state[key])}
