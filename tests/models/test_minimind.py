"""MiniMind checkpoints of three generations, dense and mixture of experts, in and out, against what the originals compute."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minicache.errors import ModelError
from minicache.models import LoadedModel, load_model, save_pth, save_tokenizer, split_source
from minicache.scoring.scorer import Scorer
from tests.scoring.test_scoring import lay_out, random_pairs

GENERATIONS = ["minimind2-2504", "minimind2-2510", "minimind3"]
NAMES = [f"{generation}-{kind}" for generation in GENERATIONS for kind in ("dense", "moe")]
MIXTURES = [name for name in NAMES if name.endswith("moe")]


@pytest.fixture(scope="session")
def fixtures(shared: Path) -> Path:
    return shared / "fixtures" / "minimind"


def logits_of(model: torch.nn.Module, input_ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(input_ids)).logits.float().numpy()


def rewritten(file: Path, target: Path, change) -> Path:
    """The file with its state dict changed."""
    state = torch.load(file, weights_only=True)
    torch.save(change(state) or state, target)
    return target


@pytest.mark.parametrize("name", NAMES)
def test_every_generation_gives_the_original_logits(fixtures: Path, name: str) -> None:
    expected = np.load(fixtures / f"{name}.npz")
    model = load_model(str(fixtures / f"{name}.pth")).model
    assert np.abs(logits_of(model, expected["input_ids"]) - expected["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_of_ddp_and_compile_and_half_precision_make_no_other_model(
    fixtures: Path, tmp_path: Path, name: str
) -> None:
    file = fixtures / f"{name}.pth"
    half = rewritten(file, tmp_path / "x.pth", lambda state: {f"module.{k}": v.half() for k, v in state.items()})
    loaded, original = load_model(str(half)), load_model(str(file))
    assert all(parameter.dtype == torch.float16 for parameter in loaded.model.parameters())
    assert loaded.fingerprint == LoadedModel(original.model.half(), "").fingerprint


def test_a_file_of_two_precisions_keeps_the_digits_of_the_longer(fixtures: Path, tmp_path: Path) -> None:
    def change(state: dict) -> dict:
        return {key: value.half() if value.ndim == 2 else value for key, value in state.items()}

    model = load_model(str(rewritten(fixtures / "minimind3-dense.pth", tmp_path / "x.pth", change))).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_other_heads_compute_what_a_model_with_these_heads_does(fixtures: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = fixtures / "minimind2-2510-dense.pth"
    ids = np.load(file.with_suffix(".npz"))["input_ids"]
    default = load_model(str(file))
    other = load_model(f"{file}:heads=16, kv_heads=4,rms_eps=1e-3,rope_theta=1e4")
    config = type(default.model.config).from_dict(default.model.config.to_dict())
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 16, 4, 4
    config.rms_norm_eps, config.rope_parameters = 1e-3, {"rope_type": "default", "rope_theta": 1e4}
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(default.model.state_dict())
    assert np.array_equal(logits_of(other.model, ids), logits_of(plain, ids))
    assert not np.allclose(logits_of(other.model, ids), logits_of(default.model, ids), atol=0.01)
    assert load_model(f"{file}:heads=16").model.config.num_key_value_heads == 4


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_heads_of_2504_order_its_rows(fixtures: Path, tmp_path: Path, kind: str) -> None:
    """A 2510 file rewritten by hand in 2504's way, rows of 16 and 4 heads interleaved, computes the same."""
    newer, older = (fixtures / f"minimind2-{year}-{kind}.pth" for year in ("2510", "2504"))
    pairs = torch.tensor([0, 2, 1, 3])  # of a head's four rows, first halves of a pair at even places

    def change(state: dict) -> dict:
        # The two fixtures list the same tensors in the same order.
        values = [
            torch.cat([block[pairs] for block in value.split(4)])
            if key.split(".")[-2] in ("q_proj", "k_proj")
            else value
            for key, value in sorted(torch.load(newer, weights_only=True).items(), key=lambda item: order(item[0]))
        ]
        return dict(zip(sorted(state, key=order), values, strict=True))

    def order(key: str) -> list[str]:
        old = [
            "tok_embeddings",
            "output",
            "attention_norm",
            "ffn_norm",
            "attention.w",
            "w1",
            "w2",
            "w3",
            "feed_forward",
        ]
        new = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "self_attn."]
        new += ["gate_proj", "down_proj", "up_proj", "mlp"]
        for ours, theirs in zip(new, old, strict=True):
            key = key.replace(theirs, ours)
        key = key.removeprefix("model.").replace("_proj", "").replace("shared_experts.0.", "shared_experts.")
        return key.split(".")

    twin = rewritten(older, tmp_path / "twin.pth", change)
    ids = np.load(newer.with_suffix(".npz"))["input_ids"]
    expected, found = (logits_of(load_model(f"{file}:heads=16").model, ids) for file in (newer, twin))
    assert np.array_equal(found, expected)
    assert save_pth(load_model(f"{twin}:heads=16").model, tmp_path / "back.pth", "float32").endswith(
        ":heads=16,kv_heads=4"
    )
    stored, back = (torch.load(file, weights_only=True) for file in (twin, tmp_path / "back.pth"))
    assert all(torch.equal(back[key], value) for key, value in stored.items())


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("minimind2-2510-dense", "heads=7", "7 heads .* do not fit"),
        ("minimind2-2510-dense", "heads=64", "do not fit"),
        ("minimind2-2510-dense", "heads=1000", "do not fit"),
        ("minimind2-2510-dense", "heads=8,kv_heads=4", "8 heads and 4 kv heads .as said. do not fit"),
        ("minimind2-2504-dense", "kv_heads=3", "do not fit; say which do: minimind2-2504-dense.pth:heads=N"),
        ("minimind3-dense", "heads=4", "a head 8: 4 heads"),
        ("minimind3-dense", "experts_per_token=2", "dense model has no experts"),
        ("minimind3-moe", "experts_per_token=5", "expected 1 to 4"),
        ("minimind2-2504-moe", "experts_per_token=1", "expected 2 to 4"),
        ("minimind3-dense", "layers=4", "'layers=4' behind the colon: expected each of heads, kv_heads"),
        ("minimind3-dense", "heads", "'heads' behind the colon: expected a whole number"),
        ("minimind3-dense", "heads=8.0", "as in heads=8"),
        ("minimind3-dense", "heads=0", "above 0"),
        ("minimind3-dense", "rms_eps=nan", "a number above 0"),
        ("minimind3-dense", "heads=8,heads=8", "at most once"),
    ],
)
def test_options_that_cannot_be_are_one_line(fixtures: Path, name: str, said: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(f"{fixtures / name}.pth:{said}")
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_the_default_heads_are_asked_about(fixtures: Path, tmp_path: Path) -> None:
    def change(state: dict) -> None:
        for key in state:
            if key.endswith(("k_proj.weight", "v_proj.weight")):
                state[key] = state[key].repeat(2, 1)

    file = rewritten(fixtures / "minimind2-2510-dense.pth", tmp_path / "x.pth", change)
    with pytest.raises(ModelError, match=r"8 heads and 2 kv heads .the default. do not fit"):
        load_model(str(file))
    assert load_model(f"{file}:kv_heads=4").model.config.num_attention_heads == 8


def test_only_what_stands_behind_a_checkpoint_is_taken_for_options() -> None:
    assert split_source("a/b.pth:heads=8") == ("a/b.pth", "heads=8")
    assert split_source("a:b/c.pt") == ("a:b/c.pt", "")
    assert split_source("org/name:x") == ("org/name:x", "")


def test_a_missing_file_and_a_missing_tokenizer_are_named_without_the_options(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.pth: no such file"):
        load_model("gone.pth:heads=16")
    with pytest.raises(ModelError, match="--tokenizer DIR"):
        save_tokenizer(f"{fixtures / 'minimind3-dense.pth'}:heads=8", tmp_path / "tokenizer", None)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("part", "message"),
    [("experts.3.", "missing: .*experts.3"), ("experts.1.", "missing"), ("gate.weight", "missing: ")],
)
def test_half_a_mixture_is_refused(fixtures: Path, tmp_path: Path, name: str, part: str, message: str) -> None:
    def change(state: dict) -> dict:
        return {key: value for key, value in state.items() if f".{part}" not in key or "shared" in key}

    with pytest.raises(ModelError, match=f"not a whole mixture-of-experts MiniMind .* of 2 layers: {message}"):
        load_model(str(rewritten(fixtures / f"{name}.pth", tmp_path / "x.pth", change)))


def test_a_transformers_too_old_for_a_mixture_is_named(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(ModelError, match=r"5\.14 or newer, and 5\.9\.1 is installed"):
        load_model(str(fixtures / "minimind3-moe.pth"))
    load_model(str(fixtures / "minimind3-dense.pth"))


def test_tensors_that_do_not_belong_are_refused(fixtures: Path, tmp_path: Path) -> None:
    def strange(state: dict) -> None:
        state["model.layers.0.self_attn.lora.A.weight"] = torch.ones(2)

    def cut(state: dict) -> None:
        state["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.ones(3, 3)

    def quantized(state: dict) -> None:
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)

    for change, message in ((strange, "not part of one: .*lora"), (cut, "not a whole"), (quantized, "int8")):
        with pytest.raises(ModelError, match=message) as caught:
            load_model(str(rewritten(fixtures / "minimind3-moe.pth", tmp_path / "x.pth", change)))
        assert "\n" not in str(caught.value)


def test_two_shared_experts_lie_side_by_side(fixtures: Path, tmp_path: Path) -> None:
    """One of them says nothing, first or last: the same logits; and both come back."""
    file = fixtures / "minimind2-2510-moe.pth"
    expected = np.load(file.with_suffix(".npz"))
    for silent in (0, 1):

        def change(state: dict, silent: int = silent) -> None:
            for key in [key for key in state if "shared_experts.0" in key]:
                value = state.pop(key)
                for index in (0, 1):
                    mute = index == silent and "down_proj" in key
                    state[key.replace("experts.0", f"experts.{index}")] = torch.zeros_like(value) if mute else value

        two = rewritten(file, tmp_path / "two.pth", change)
        model = load_model(str(two)).model
        assert np.abs(logits_of(model, expected["input_ids"]) - expected["logits"]).max() < 1e-4
        save_pth(model, tmp_path / "back.pth", "float32")
        stored, back = (torch.load(path, weights_only=True) for path in (two, tmp_path / "back.pth"))
        assert stored.keys() == back.keys() and all(torch.equal(back[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_scored_as_its_full_logits_say(fixtures: Path, name: str) -> None:
    model, pairs = load_model(str(fixtures / f"{name}.pth")).model, random_pairs(6)
    batch = lay_out(pairs)
    with torch.no_grad():
        logps = model(batch.input_ids).logits.log_softmax(-1).flatten(0, 1)  # (rows x length, vocabulary)
        expected = logps[batch.sources].gather(1, batch.targets[:, None])[:, 0]
        assert (Scorer(model, "float32")(batch).token_logps - expected).abs().max() < 1e-5
        # Not the largest: where two experts score alike, rounding sends a token to the other one.
        assert (Scorer(model, "bfloat16")(batch).token_logps - expected).abs().median() < 0.02
