"""What a config describes is held against what can be, and against the files, before memory is taken for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from minicache.errors import ModelError
from minicache.models import described, huggingface, load_model
from minicache.models.described import require_countable, require_held
from minicache.models.outline import outline_of
from tests.conftest import tiny_llama
from tests.models.test_models import gguf_file

__all__ = ["gguf_file"]  # a fixture


def changed(directory: Path, **settings: Any) -> str:
    """A tiny model's directory whose config.json says something else."""
    tiny_llama().save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(directory)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10_001},
        {"n_layer": 10**10},
        {"num_local_experts": 10**10},
        {"num_labels": 10**10},
        {"text_config": {"num_hidden_layers": 10**10}},
        {"parts": [{"num_nextn_predict_layers": 10**10}]},
    ],
)
def test_numbers_that_nothing_counts_to_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"here: its config\.json says \w+ 10,0[\d,]+; expected at most 10,000"):
        require_countable("here", settings)
    require_countable("here", {"num_hidden_layers": 10_000, "max_position_embeddings": 10**7, "n_embd": 10**5})
    require_countable("here", ["num_hidden_layers", 10**10])


def test_no_command_counts_the_layers_of_a_config(tmp_path: Path) -> None:
    source = changed(tmp_path / "model", model_type="qwen3", num_hidden_layers=10**10)
    for load in (load_model, outline_of):
        with pytest.raises(ModelError, match="num_hidden_layers 10,000,000,000; expected at most 10,000"):
            load(source)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_config_of_another_model_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The mismatch would be named after weights of the config's size were drawn."""
    source = changed(tmp_path / "model", intermediate_size=5_000_000)
    if form == "bin":
        weights = tmp_path / "model" / "model.safetensors"
        torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
        weights.unlink()
    monkeypatch.setattr("minicache.models.stored.loading_options", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        ModelError, match=r"config\.json describes a model of 960,0\d\d,\d\d\d weights, and its weights take"
    ):
        load_model(source)


def test_a_gguf_of_another_width_takes_no_memory(gguf_file: Path) -> None:
    config = huggingface.from_pretrained(AutoConfig, str(gguf_file), False)
    require_held(str(gguf_file), config)
    config.intermediate_size = 5_000_000
    with pytest.raises(ModelError, match=r"gguf: it describes a model of 96\d,\d\d\d,\d\d\d weights"):
        require_held(str(gguf_file), config)


def test_how_much_larger_a_described_model_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many weights as bytes, since some are stored in 8 bits; eight times as many of those that are stored quantized."""
    source = changed(tmp_path / "model")
    config = AutoConfig.from_pretrained(source)
    held = (tmp_path / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(described, "FEW", 0)
    for quantized, most in ((None, held), ({"quant_method": "fp8"}, 8 * held)):
        config.quantization_config = quantized
        monkeypatch.setattr(described, "_described", lambda _, most=most: most)
        require_held(source, config)
        monkeypatch.setattr(described, "_described", lambda _, most=most: most + 1)
        with pytest.raises(ModelError, match="expected those of one model"):
            require_held(source, config)
    assert config.quantization_config == {"quant_method": "fp8"}


def test_what_cannot_be_known_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub, whose files may not be here yet; a class of another's code; one that cannot be built."""
    config = AutoConfig.for_model("llama", intermediate_size=5_000_000)
    require_held("org/name", config)
    source = changed(tmp_path / "model")
    require_held(source, AutoConfig.for_model("clip"))
    require_held(source, AutoConfig.for_model("llama", hidden_act="none of them"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 13476839424\n"


@pytest.mark.parametrize("what", ["a pointer", "half of a download"])
def test_a_large_model_that_is_not_all_there_is_named_by_what_it_lacks(tmp_path: Path, what: str) -> None:
    directory = Path(changed(tmp_path / "model", intermediate_size=5_000_000))
    weights = directory / "model.safetensors"
    if what == "a pointer":
        weights.write_bytes(POINTER)
        said = r"model\.safetensors: .*Git LFS"
    else:
        weights.rename(directory / "model-00001-of-00002.safetensors")
        files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        said = (
            r"index\.json: names model-00002-of-00002\.safetensors, which is not beside it; copy or download it again"
        )
    with pytest.raises(ModelError, match=said):
        load_model(str(directory))
