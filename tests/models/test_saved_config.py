"""What is added to a saved config.json for transformers 4. Its names are those of 4.57.6, which opened such directories right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minicache.models import saved_config
from minicache.models.fingerprint import _settings
from minicache.models.load import save_model
from tests.conftest import tiny_llama
from tests.zoo.families import Family, families, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
ADDED = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype"}
ADDED |= {
    "num_experts",
    "rotary_emb_base",
    "rotary_pct",
    "rope_local_base_freq",
    "global_rope_theta",
    "local_rope_theta",
}


def saved(config: Any, directory: Path) -> dict[str, Any]:
    """The config.json of a policy of this config."""
    config.save_pretrained(directory)
    saved_config.complete(directory / "config.json", nn.Linear(1, 1))
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def changed(config: Any) -> Iterator[Any]:
    """The config with rotary bases of its own, and with a scaling, where its class takes them."""
    yield config
    rope = getattr(config, "rope_parameters", None)
    if rope:
        for scaling in ({}, {"rope_type": "linear", "factor": 3.0}, LLAMA3):
            given = config.to_dict()
            turned = given["rope_parameters"]
            layers = [each for each in turned.values() if isinstance(each, dict)] or [turned]
            for number, each in enumerate(layers):
                each["rope_theta"] = 54321.0 + number
            (turned.get("full_attention") or layers[0]).update(scaling)
            try:
                yield type(config).from_dict(given)
            # a class that takes no such scaling
            except Exception:
                continue


@pytest.mark.filterwarnings("ignore")
def test_transformers_5_reads_back_the_config_that_it_wrote(tmp_path: Path) -> None:
    """Of every family: all but the added entries, and what a fingerprint is of; so is a config that has them already."""
    from transformers import AutoConfig

    count = 0
    for number, family in enumerate(families()):
        try:
            configs = list(changed(tiny_config(family)))
        # a class that needs a package
        except ImportError:
            continue
        for each in configs:
            count += 1
            written = saved(each, tmp_path / f"{number}-{count}")
            again = AutoConfig.from_pretrained(tmp_path / f"{number}-{count}")
            one, other = (
                {k: v for k, v in c.to_dict().items() if k not in (*ADDED, "_name_or_path")} for c in (each, again)
            )
            assert other == one, family.name
            if not each.is_encoder_decoder:
                assert _settings(again) == _settings(each), family.name
            assert saved(again, tmp_path / f"{number}-{count}") == written, family.name
    assert count > 400


@pytest.mark.parametrize(
    ("kind", "rope", "expected"),
    [
        ("llama", {"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        ("llama", {"rope_theta": 5e5, **LLAMA3}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("glm", {"rope_theta": 5e5, "partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rope_theta": 5e5, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 5e5, "rotary_pct": 0.5}),
        ("olmo2", {"type": "linear", "factor": 2.0}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("phi3", {"rope_theta": 5e5, **LONG}, {"rope_theta": 5e5, "rope_scaling": LONG}),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 3e4, "rope_type": "default"},
            },
            {
                "rope_theta": 5e5,
                "rope_local_base_freq": 3e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_the_entries_of_transformers_4(
    tmp_path: Path, kind: str, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    written = saved(tiny_config(Family(kind, kind, {"rope_parameters": rope})), tmp_path)
    assert written | expected == written
    assert "rope_scaling" in expected or "rope_scaling" not in written


def test_they_stand_in_the_part_that_is_about_text(tmp_path: Path) -> None:
    config = tiny_config(Family("gemma3", "gemma3"))
    config.text_config.rope_parameters["full_attention"]["rope_theta"] = 5e5
    written = saved(config, tmp_path)["text_config"]
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (5e5, 1e4)


def test_a_scaling_that_a_class_of_transformers_4_cannot_take_is_refused_by_it(tmp_path: Path) -> None:
    """Not passed over: its class counts the entries."""
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    written = saved(tiny_config(Family("olmo2", "olmo2", {"rope_parameters": {**rope}})), tmp_path)
    assert written["rope_scaling"] == rope


def test_layers_experts_and_infinity_are_named_as_before(tmp_path: Path) -> None:
    tiny = {family.name: family for family in families()}
    assert saved(tiny_config(tiny["mamba2"]), tmp_path / "a")["time_step_limit"] == [0.0, float("inf")]
    hybrid = saved(tiny_config(tiny["granitemoehybrid"]), tmp_path / "b")
    assert set(hybrid["layer_types"]) <= {"mamba", "attention"}
    experts = saved(tiny_config(tiny["qwen3_moe"]), tmp_path / "c")
    assert experts["num_experts"] == experts["num_local_experts"] == 4


def test_a_policy_has_them(tokenizer_dir: Path, tmp_path: Path) -> None:
    model: Any = tiny_llama()
    model.config.rope_parameters = {"rope_theta": 5e5, **LLAMA3}
    save_model(model.to(torch.bfloat16), tokenizer_dir, tmp_path / "policy")
    written = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, LLAMA3)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_what_a_config_says_already_gives_way_to_what_the_model_computes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    )
    saved_config.complete(tmp_path / "config.json", nn.Linear(1, 1))
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_moe"},
        {"model_type": "granitemoehybrid"},
        {"model_type": "granitemoehybrid", "layer_types": None},
        {"model_type": "llama", "rope_parameters": [1]},
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {}, "sliding_attention": None}},
    ],
)
def test_a_config_that_says_less_than_expected_is_saved_as_it_is(tmp_path: Path, config: dict[str, Any]) -> None:
    """Another version of transformers may write other names; no policy is lost for that."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    saved_config.complete(tmp_path / "config.json", nn.Linear(1, 1))
    assert json.loads((tmp_path / "config.json").read_text()) == config
