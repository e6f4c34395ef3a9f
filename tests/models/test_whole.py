"""A checkpoint is used whole or refused by name: nothing is made up for what is missing, nothing left over is dropped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache.errors import ConfigError, ModelError
from minicache.models import load_model
from minicache.models.adapter_targets import targets
from minicache.models.lora import add_lora
from minicache.models.whole import _stored
from minicache.options.train import LoraOptions, TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import one_process, precompute_into, tiny_llama

State = dict[str, torch.Tensor]


def saved(directory: Path, change: Callable[[State], State], config: dict[str, Any] | None = None) -> str:
    """A tiny model's directory with other weights in its file, or another config."""
    tiny_llama().save_pretrained(directory)
    file, settings = directory / "model.safetensors", directory / "config.json"
    save_file(change(load_file(file)), file, {"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | (config or {})))
    return str(directory)


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {name: weight for name, weight in state.items() if not any(part in name for part in parts)}


WRONG: dict[str, tuple[Callable[[State], State], dict[str, Any], str]] = {
    "a headless base": (without("lm_head"), {}, "1 of LlamaForCausalLM's weights are not in its files (lm_head.weight)"),
    "a lost layer": (without("layers.1."), {}, "(model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "),
    "a classifier": (
        lambda state: without("lm_head")(state) | {"score.weight": torch.zeros(2, 32)},
        {"architectures": ["LlamaForSequenceClassification"]},
        "(its config.json says LlamaForSequenceClassification): 1 of LlamaForCausalLM's weights are not in its files "
        "(lm_head.weight); 1 in its files have no place in LlamaForCausalLM (score.weight)",
    ),
    "fewer layers in the config": (lambda state: state, {"num_hidden_layers": 1}, "have no place in LlamaForCausalLM (model.l"),
    "more layers in the config": (lambda state: state, {"num_hidden_layers": 3}, "weights are not in its files (model.layers.2."),
    "a wrapper's names": (
        lambda state: {f"module.{name}": weight for name, weight in state.items()}, {}, "saved from inside a wrapper"
    ),
    "another width": (lambda state: state, {"intermediate_size": 96}, "down_proj.weight is (32, 64), config.json says (32, 96)"),
    "scales left over": (
        lambda state: state | {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}, {}, "weight_scale_inv"
    ),
    "float8 without scales": (
        lambda state: state | {
            name: weight.to(torch.float8_e4m3fn) for name, weight in state.items() if "up_proj" in name
        },
        {"dtype": "bfloat16"},
        "up_proj.weight is stored as F8_E4M3, and config.json has no quantization_config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_checkpoint_that_is_not_whole_is_told_for_what_it_is(case: str, tmp_path: Path) -> None:
    change, config, message = WRONG[case]
    with pytest.raises(ModelError) as error:
        load_model(saved(tmp_path / "model", change, config))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_float8_in_a_pickled_checkpoint_is_refused_too(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    for is_zip in (True, False):
        torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
        load_model(str(model))
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.float8_e4m3fn)
    torch.save(state, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"lm_head\.weight is stored as FLOAT8_E4M3FN, and config\.json has no"):
        load_model(str(model))


def test_old_tables_that_are_no_weights_are_no_reason_to_refuse(tmp_path: Path) -> None:
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert load_model(saved(tmp_path / "model", lambda state: state | table)).left_out is None


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", '{"weight_map": {', '{"weight_map": 1}', "version https://git-lfs.github.com/spec/v1", "[" * 100_000,
     '{"weight_map": {"lm_head.weight": "old.safetensors"}}'],
)  # fmt: skip
def test_an_index_left_beside_the_weights_is_not_read(content: str, tmp_path: Path) -> None:
    """As transformers does, which loads the one file."""
    source = saved(tmp_path / "model", lambda state: state)
    save_file({"old.visual.weight": torch.ones(1).to(torch.float8_e4m3fn)}, tmp_path / "model" / "old.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    assert load_model(source).left_out is None


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 1}', "{", "[" * 100_000])
def test_an_index_that_cannot_be_read_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model.safetensors.index.json: ") as error:
        _stored(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", "t5 is an encoder-decoder; expected a decoder-only"),
        ("bart", "bart is an encoder-decoder"),
        ("qwen2_vl", "qwen2_vl is a vision-language model, which minidpo does not train"),
        ("clip", "clip is no causal language model that transformers knows"),
    ],
)
def test_another_kind_of_model_is_told_in_one_sentence(family: str, message: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))


def test_weights_that_a_class_leaves_out_by_design_are_listed(tmp_path: Path) -> None:
    """Qwen3.5's checkpoints hold a vision tower and heads for several tokens at once beside the language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "layer_types": ["full_attention"],
    }  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_5_text", **settings)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"model.visual.patch_embed.proj.weight": torch.ones(2), "mtp.fc.weight": torch.ones(2)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    line = load_model(str(tmp_path)).left_out
    assert (
        line
        and "2 weights in its files are no part of Qwen3_5ForCausalLM (model.visual.patch_embed"
        in line.replace("mtp.fc.weight, ", "")
    )
    assert "the policy is saved without them" in line


def of_two_modes(directory: Path) -> Path:
    """As Gemma 3 from 4B on: a vision tower beside the language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    text = {
        "vocab_size": 6400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"image_token_index": 390, "boi_token_index": 391, "eoi_token_index": 392, "mm_tokens_per_image": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **marks)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("asked", "adapted"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_no_adapter_lies_where_text_never_comes(tmp_path: Path, asked: str, adapted: set[str]) -> None:
    """Its gradient would never come, for which DDP would wait."""
    model = load_model(str(of_two_modes(tmp_path / "model"))).model
    with_adapters = add_lora(model, "base", LoraOptions(lora_rank=2, lora_targets=asked), 0, Silent())
    names = [name.partition(".lora_A")[0] for name, _ in with_adapters.named_parameters() if "lora_A" in name]
    assert {name.rpartition(".")[2] for name in names} == adapted and all("language_model" in name for name in names)
    with_adapters(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    trained = [each for each in with_adapters.parameters() if each.requires_grad]
    assert trained and all(each.grad is not None for each in trained)


@pytest.mark.parametrize("asked", ["out_proj", "q_proj,fc1", "model.vision_tower.encoder.layers.0.self_attn.q_proj"])
def test_modules_that_text_never_reaches_are_no_targets(tmp_path: Path, asked: str) -> None:
    model = load_model(str(of_two_modes(tmp_path / "model"))).model
    with pytest.raises(
        ConfigError, match=r"no linear modules that text reaches named .*; expected all-linear, or some of"
    ):
        targets(model, asked)


def test_a_tower_beside_the_language_model_is_kept_as_it_is(
    tmp_path: Path, tokenizer_dir: Path, data_file: Path
) -> None:
    """Gemma 3 from 4B on: text is scored and trained, also by several processes, and the policy is saved with its tower."""
    loaded = load_model(str(of_two_modes(tmp_path / "model")))
    assert loaded.left_out and "only the language model of Gemma3ForConditionalGeneration is used" in loaded.left_out
    cache = precompute_into(tmp_path / "cache", tmp_path / "model", data_file, tokenizer=str(tokenizer_dir))
    run = train(TrainConfig(cache, tmp_path / "run", max_steps=2, lr=1e-3), one_process(), Silent())
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", run.model_dir))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "language_model" not in name}
