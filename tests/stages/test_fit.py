"""`fit`: from a config alone, what both stages need, and the commands that fit."""

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.errors import ConfigError, ModelError
from minicache.models.outline import held_for, outline_of
from minicache.options.base import BaseOptions
from minicache.options.declare import flag
from minicache.options.fit import FitConfig, bytes_in
from minicache.options.lora import NO_LORA, LoraOptions
from minicache.scoring.memory import bytes_of
from minicache.stages.fit import FitReport, Way, fit
from minicache.trackers import Silent
from tests.conftest import one_process, tiny_llama

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds config.json and nothing else."""
    directory = tmp_path_factory.mktemp("config-only")
    (directory / "config.json").write_text(json.dumps(SMALL))
    return directory


def found(config: FitConfig) -> FitReport:
    return fit(config, one_process(), Silent())


def way(report: FitReport, name: str, checkpointing: bool = False) -> Way:
    (only,) = (each for each in report.ways if (each.name, each.checkpointing) == (name, checkpointing))
    return only


@pytest.fixture(scope="module")
def report(config_only: Path) -> FitReport:
    return found(FitConfig(str(config_only), max_length=64, memory=("0.1MB", "3GB", "24GB")))


def test_weights_gradients_and_optimizer_are_those_of_the_parameters(report: FitReport) -> None:
    whole = way(report, "all weights")
    assert (whole.weights, whole.gradients, whole.optimizer, whole.copies) == tuple(
        factor * report.parameters for factor in (4, 4, 8, 0)
    )
    narrow = way(report, "all weights, in bfloat16")
    # norms are float32, and scales of the state stand beside its 8 bits
    assert narrow.gradients == narrow.weights < 2.03 * report.parameters
    assert narrow.optimizer == (2 + 1 / 32) * report.parameters
    assert "--weights bfloat16" in narrow.commands["24GB"]
    assert narrow.fixed < 0.1 * whole.fixed
    adapters = way(report, "adapters of rank 16")
    assert 0 < adapters.gradients < 0.5 * whole.gradients and adapters.optimizer == 2 * adapters.gradients
    four = way(report, "adapters of rank 16, base in 4 bits")
    assert four.weights < adapters.weights and four.gradients == adapters.gradients


def test_checkpointing_makes_slots_smaller_and_room_larger(report: FitReport) -> None:
    for plain in report.ways:
        if plain.stage == "train" and not plain.checkpointing:
            checkpointed = way(report, plain.name, checkpointing=True)
            assert checkpointed.slot < plain.slot
            assert all(checkpointed.room[name] >= plain.room[name] for name in report.memory)


def test_what_fits_has_a_command_with_its_options_and_what_does_not_has_none(report: FitReport) -> None:
    for each in report.ways:
        assert each.room["0.1MB"] == 0 and "0.1MB" not in each.commands
        assert each.room["24GB"] == 65536
        words = each.commands["24GB"].split()
        assert words[:2] == ["minidpo", each.stage] and words[-1] == "65536"
        assert ("--activation-checkpointing" in words) == each.checkpointing
    assert "--lora-rank 16" in way(report, "adapters of rank 16").commands["24GB"]
    assert "--base-4bit" in way(report, "the reference in 4 bits").commands["24GB"]


def test_the_commands_can_be_parsed(report: FitReport) -> None:
    import typer

    from minicache.cli import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for each in report.ways:
        _, name, *arguments = each.commands["24GB"].split()
        commands[name].make_context(name, list(arguments))


@pytest.mark.slow
def test_shards_divide_and_whole_models_do_not(config_only: Path) -> None:
    config = FitConfig(str(config_only), max_length=64, memory=("24GB",), nproc=8, parallel="fsdp")
    sharded = found(config)
    whole = way(sharded, "all weights")
    assert whole.weights == 4 * sharded.parameters / 8 and whole.optimizer == sharded.parameters
    # the head's weight and the buffer in which it comes
    assert whole.fixed >= 2 * 4 * SMALL["vocab_size"] * SMALL["hidden_size"]  # type: ignore[operator]
    assert "--nproc 8 --parallel fsdp" in whole.commands["24GB"]
    assert not any("bits" in each.name for each in sharded.ways)
    copied = way(found(replace(config, parallel="ddp")), "all weights")
    assert (copied.weights, copied.copies) == (4 * sharded.parameters, 0)


@pytest.mark.slow
def test_only_what_is_asked_for_is_counted(config_only: Path) -> None:
    asked = FitConfig(str(config_only), max_length=64, memory=("24GB",), lora=LoraOptions(lora_rank=2))
    report = found(replace(asked, base=BaseOptions(base_8bit=True)))
    assert {each.name for each in report.ways} == {"the reference in 8 bits", "adapters of rank 2, base in 8 bits"}
    report = found(asked)
    assert {each.name for each in report.ways} == {"the reference", "adapters of rank 2"}
    report = found(replace(asked, lora=LoraOptions(), weights="bfloat16", optimizer="adamw-cpu"))
    narrow = way(report, "all weights, in bfloat16")
    assert narrow.optimizer == 0 and "--weights bfloat16 --optimizer adamw-cpu" in narrow.commands["24GB"]
    assert not any(each.name in ("all weights", "adapters of rank 16") for each in report.ways)


@pytest.mark.parametrize("quantization", ["nf4-double", "int8"])
def test_quantized_weights_take_what_bitsandbytes_takes(tmp_path: Path, model_dir: Path, quantization: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="the quantized extra is not installed")
    from minicache.models import load_model

    loaded = load_model(str(model_dir), quantization=quantization)
    held = [each for each in loaded.model.modules() if isinstance(each, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    real = sum(each.weight.numel() for each in held)
    model = held_for(outline_of(str(model_dir)), NO_LORA, quantization, "float32", trained=False)
    counted = sum(each.numel() for each in model.parameters() if each.dtype == torch.uint8)
    assert real <= counted < 1.1 * real + 4 * 64 * len(held)


def test_the_outline_of_a_model_is_its_shapes(model_dir: Path) -> None:
    model = outline_of(str(model_dir)).model
    loaded = tiny_llama()
    assert all(each.is_meta for each in model.parameters())
    assert {name: each.shape for name, each in model.named_parameters()} == {
        name: each.shape for name, each in loaded.named_parameters()
    }
    assert bytes_of(model.parameters()) == bytes_of(loaded.parameters())


def test_a_minimind_file_has_an_outline(checkpoints: Path) -> None:
    file = next(iter(sorted(checkpoints.glob("*dense*.pth"))))
    assert all(each.is_meta for each in outline_of(str(file)).model.parameters())


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24", 24e9), ("1.5 GiB", 1.5 * 2**30), ("800mb", 8e8)])
def test_sizes(text: str, size: float) -> None:
    assert bytes_in(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 potatoes", "-3GB", "0GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory: expected a size such as 24GB"):
        FitConfig("m", memory=(text,))


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such directory|expected a model directory"):
        found(FitConfig(str(tmp_path / "nothing")))


def test_shards_of_quantized_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantized weights cannot be sharded"):
        FitConfig("m", nproc=8, parallel="fsdp", base=BaseOptions(base_4bit=True), lora=LoraOptions(lora_rank=16))


@pytest.mark.parametrize(
    "lora",
    [
        LoraOptions(lora_rank=4, lora_dora=True),
        LoraOptions(lora_rank=4, lora_targets="q_proj, v_proj", lora_rslora=True, lora_alpha=8.0),
    ],
)
def test_a_command_has_all_that_was_asked_for(config_only: Path, lora: LoraOptions) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install '.[lora]'")
    config = FitConfig(
        str(config_only), max_length=64, memory=("24GB",), lora=lora, dtype="float32", trust_remote_code=True
    )
    (adapters,) = [each for each in found(config).ways if each.stage == "train" and not each.checkpointing]
    words = shlex.split(adapters.commands["24GB"])
    expected, defaults = (
        {flag(item.name): getattr(each, item.name) for item in fields(lora)} for each in (lora, NO_LORA)
    )
    for name, value in expected.items():
        assert (name in words) == bool(value != defaults[name]), name
        assert name not in words or value is True or words[words.index(name) + 1] == str(value)
    assert words[words.index("--dtype") + 1] == "float32" and "--trust-remote-code" in words


def test_a_family_with_its_own_linear_layers(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install '.[lora]'")
    from transformers import FalconConfig

    FalconConfig(vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=4).save_pretrained(tmp_path)
    config = FitConfig(str(tmp_path), max_length=64, memory=("24GB",), lora=LoraOptions(lora_rank=4))
    assert way(found(config), "adapters of rank 4").gradients > 0


def test_what_cannot_be_counted_or_loaded_is_refused(config_only: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--continue-adapter: fit counts new adapters; expected --lora-rank"):
        FitConfig(str(config_only), lora=LoraOptions(continue_adapter=True))
    settings = json.loads((config_only / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(settings | quantized))
    with pytest.raises(ModelError, match="is stored quantized by awq, which minidpo cannot train on"):
        found(FitConfig(str(tmp_path), max_length=64, memory=("24GB",)))


def test_a_family_that_marks_no_layers_is_counted_without_checkpointing(
    config_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicache.stages.fit.layers_of", lambda model: [])
    report = found(FitConfig(str(config_only), max_length=64, memory=("24GB",), lora=LoraOptions(lora_rank=4)))
    assert [each.checkpointing for each in report.ways] == [False, False]
