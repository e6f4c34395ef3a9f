"""Some families of the zoo: right in every number, in the best layout that their attention allows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minicache.options.catalog import LAYOUTS
from tests.zoo.families import Family, families, nature, tiny_config
from tests.zoo.table import is_listed_first, lora_of, shards_of, verdict

EXPECTED = {
    "llama": "packed",
    "qwen2": "packed",
    "qwen3": "packed",
    "qwen3_moe": "packed",
    "gemma2": "packed",
    "gemma3_text": "packed",
    "mistral": "packed",
    "mixtral": "packed",
    "phi3": "packed",
    "gpt2": "packed",
    "gpt_oss": "packed",
    "olmo3": "packed",
    "cohere2": "packed",
    "falcon": "packed",
    "qwen3_next": "padded",
    "lfm2": "padded",
    "mamba": "padded",
}


@pytest.mark.slow
def test_families_are_right_in_the_layout_expected(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.zoo", "--only", ",".join(EXPECTED), "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=280, cwd=Path(__file__).parents[2])
    results = [json.loads(each) for each in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {each["name"]: each for each in results if each["name"] in EXPECTED}
    assert found.keys() == EXPECTED.keys()
    for name, layout in EXPECTED.items():
        assert verdict(found[name]) == "right", found[name]
        # In the order in which `auto` tries them: a family may do better than is expected here.
        used, order = found[name]["cache"]["layout"], list(LAYOUTS)
        assert order.index(used) <= order.index(layout), f"{name}: {used}"
        assert lora_of(found[name]) == "yes", found[name]["lora"]
        assert "failed" not in found[name]["half"], found[name]["half"]
        assert shards_of(found[name]).endswith("layers"), found[name]["shards"]


def test_every_family_of_the_mapping_is_in_the_zoo() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

    everyone = families()
    assert {family.kind for family in everyone} == set(causal)
    assert len({family.name for family in everyone}) == len(everyone)


def test_a_tiny_configuration_has_every_kind_of_layer() -> None:
    config = tiny_config(Family("gemma3_text", "gemma3_text"))
    assert config.layer_types == ["sliding_attention", "full_attention"] and config.num_hidden_layers == 2
    assert config.hidden_size == 64 and config.head_dim == 16 and config.vocab_size == 512


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("llama", "decoder"), ("bert", "encoder"), ("bart", "encoder-decoder"), ("gemma3", "multimodal")],
)
def test_what_a_family_is(kind: str, expected: str) -> None:
    assert nature(Family(kind, kind)) == expected


def test_a_number_beyond_its_bound_is_wrong() -> None:
    cache = {"layout": "packed", "off": 9e-6}
    train = {"gradient_off": 2.9e-5, "losses_off": 9e-5, "norms_off": 9e-3, "policy_off": 9e-4, "keys_off": []}
    half = {"share": 0.9, "scores": [], "gradients": []}
    found = {"name": "a", "nature": "encoder", "cache": cache, "train": train, "half": half}
    assert verdict(found) == "right" and is_listed_first(found)
    for part, name, value in (
        ("cache", "off", 1.1e-5),
        ("cache", "off", float("nan")),
        ("train", "losses_off", 1.1e-4),
        ("train", "gradient_off", 3.1e-5),
        ("train", "norms_off", 1.1e-2),
        ("train", "policy_off", 1.1e-3),
        ("train", "keys_off", ["lm_head.weight"]),
        ("half", "scores", ["entropy"]),
        ("half", "gradients", ["lora_A's gradient"]),
    ):
        changed = {**found, part: {**found[part], name: value}}  # type: ignore[dict-item]
        assert verdict(changed) == "wrong" and not is_listed_first(changed), name
    refused = {**found, "cache": {"failed": "no", "raw": False}}
    assert verdict(refused) == "refused"
    assert verdict({**found, "cache": {"failed": "no", "raw": True}}) == "error"
