"""MiniMind checkpoints of three generations, dense and mixture of experts, in and out, against the references of each."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.cache.reader import ReferenceCache
from minicache.errors import ModelError
from minicache.models import LoadedModel, load_model, save_pth, save_tokenizer, split_source
from minicache.models.file_kinds import is_path
from minicache.scoring.scorer import Scorer
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.references.checkpoints import MIXTURES, NAMES, draw, reference_of, some_ids
from tests.references.conversations import encode, shifted
from tests.references.formulas import clearness
from tests.scoring.test_scoring import lay_out, random_pairs

State = dict[str, torch.Tensor]
TOLERANCE = 2e-5  # of a logit; their standard deviation is 0.8


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """ids: (R, L). Returns: (R, L, vocabulary) float32."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits.float()
    return logits


def config_of(source: str) -> Any:
    return load_model(source).model.config


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference between two tensors of one shape."""
    return (found - expected).abs().max().item()


def rewritten(file: Path, target: Path, change: Callable[[State], State | None]) -> Path:
    """The file with its state dict changed."""
    state = torch.load(file, weights_only=True)
    torch.save(change(state) or state, target)
    return target


@pytest.mark.parametrize("name", NAMES)
def test_every_generation_computes_what_its_reference_does(checkpoints: Path, name: str) -> None:
    """And nothing else: another setting of the reference is far outside the tolerance."""
    reference, state, ids = reference_of(name), draw(name), some_ids()
    found = logits_of(load_model(str(checkpoints / f"{name}.pth")).model, ids)
    computed = reference.compute(state, ids)
    assert not computed.scores or clearness(computed.scores, reference.DEFAULTS.experts_per_token) > 1e-4
    assert distance(found, computed.logits) < TOLERANCE
    others = {"rms_eps": 2 * reference.DEFAULTS.rms_eps, "rope_theta": 0.99e6}
    others |= {"experts_per_token": reference.DEFAULTS.experts_per_token + 1} if name.endswith("moe") else {}
    for setting, value in others.items():
        other = reference.compute(state, ids, replace(reference.DEFAULTS, **{setting: value})).logits
        assert distance(found, other) > 5 * TOLERANCE, setting


@pytest.mark.parametrize("name", NAMES)
def test_an_untied_head_and_saved_tables_are_read(tmp_path: Path, name: str) -> None:
    """Some versions saved the tables of their rotary positions and masks, which follow from the rest."""
    state, ids = draw(name, tied=False), some_ids()
    tables = {key: torch.ones(3) for key in ("freqs_cos", "model.freqs_sin", "pos_cis", "layers.0.attention.mask")}
    torch.save(state | tables, tmp_path / "x.pth")
    found = logits_of(load_model(str(tmp_path / "x.pth")).model, ids)
    assert distance(found, reference_of(name).compute(state, ids).logits) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_of_ddp_and_compile_and_half_precision_make_no_other_model(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    file = checkpoints / f"{name}.pth"
    half = rewritten(file, tmp_path / "x.pth", lambda state: {f"module.{k}": v.half() for k, v in state.items()})
    loaded, original = load_model(str(half)), load_model(str(file))
    assert all(parameter.dtype == torch.float16 for parameter in loaded.model.parameters())
    assert loaded.fingerprint == LoadedModel(original.model.half(), "").fingerprint


def test_a_file_of_two_precisions_keeps_the_digits_of_the_longer(checkpoints: Path, tmp_path: Path) -> None:
    def change(state: State) -> State:
        return {key: value.half() if value.ndim == 2 else value for key, value in state.items()}

    model = load_model(str(rewritten(checkpoints / "minimind3-dense.pth", tmp_path / "x.pth", change))).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_options_in_the_name_compute_what_the_reference_does_with_them(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    """Of 2504 the heads decide the order of rows as well. All of it comes back, the options in the name."""
    reference, state, ids = reference_of(name), draw(name), some_ids()
    options: dict[str, float] = {} if name.startswith("minimind3") else {"heads": 16, "kv_heads": 4}
    options |= {"experts_per_token": 3} if name.endswith("moe") else {}
    options |= {"rms_eps": 0.001, "rope_theta": 10000.0}
    said = ",".join(f"{option}={value}" for option, value in options.items())
    model = load_model(f"{checkpoints / name}.pth:{said}").model
    expected = reference.compute(state, ids, replace(reference.DEFAULTS, **options)).logits
    assert distance(logits_of(model, ids), expected) < TOLERANCE
    assert save_pth(model, tmp_path / "back.pth", "float32") == f"{tmp_path / 'back.pth'}:{said}"
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


def test_one_number_of_heads_tells_the_other(checkpoints: Path) -> None:
    file = checkpoints / "minimind2-2510-dense.pth"
    assert config_of(f"{file}: heads=16 , rms_eps=1e-3").num_key_value_heads == 4
    assert config_of(f"{file}:kv_heads=4").num_attention_heads == 16


def test_a_relative_name_with_options(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoints.parent)
    for place in (
        f"{checkpoints.name}/minimind2-2510-dense.pth:heads=16",
        f"./{checkpoints.name}/minimind2-2510-dense.pth:heads=16",
    ):
        assert load_model(place).left_out is None
    monkeypatch.chdir(checkpoints)
    assert load_model("minimind2-2510-dense.pth:heads=16").left_out is None


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("minimind2-2510-dense", "heads=7", "7 heads .* do not fit"),
        ("minimind2-2510-dense", "heads=64", "do not fit"),
        ("minimind2-2510-dense", "heads=1000", "do not fit"),
        ("minimind2-2510-dense", "heads=8,kv_heads=4", "8 heads and 4 kv heads .as named. do not fit"),
        ("minimind2-2504-dense", "kv_heads=3", "do not fit; name those that do: minimind2-2504-dense.pth:heads=N"),
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
def test_options_that_cannot_be_are_one_line(checkpoints: Path, name: str, said: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(f"{checkpoints / name}.pth:{said}")
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_the_default_heads_are_asked_about(checkpoints: Path, tmp_path: Path) -> None:
    def change(state: State) -> None:
        for key in state:
            if key.endswith(("k_proj.weight", "v_proj.weight")):
                state[key] = state[key].repeat(2, 1)

    file = rewritten(checkpoints / "minimind2-2510-dense.pth", tmp_path / "x.pth", change)
    with pytest.raises(ModelError, match=r"8 heads and 2 kv heads .the default. do not fit"):
        load_model(str(file))
    assert config_of(f"{file}:kv_heads=4").num_attention_heads == 8


def test_only_what_stands_behind_a_checkpoint_is_taken_for_options() -> None:
    assert split_source("a/b.pth:heads=8") == ("a/b.pth", "heads=8")
    assert split_source("a:b/c.pt") == ("a:b/c.pt", "")
    assert split_source(r"C:\a b\c.pth:heads=8") == (r"C:\a b\c.pth", "heads=8")
    assert split_source(r"C:\a.pth") == (r"C:\a.pth", "")
    assert is_path(r"models\a") and is_path(r"C:\models\a") and is_path("./a") and is_path("a/b/c")
    assert not is_path("org/name") and not is_path("gpt2")
    assert split_source("org/name:x") == ("org/name:x", "")


def test_a_missing_file_and_a_missing_tokenizer_are_named_without_the_options(
    checkpoints: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"gone\.pth: no such file"):
        load_model("gone.pth:heads=16")
    with pytest.raises(ModelError, match="--tokenizer DIR"):
        save_tokenizer(f"{checkpoints / 'minimind3-dense.pth'}:heads=8", tmp_path / "tokenizer", None)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("part", "message"),
    [("experts.3.", "missing: .*experts.3"), ("experts.1.", "missing"), ("gate.weight", "missing: ")],
)
def test_half_a_mixture_is_refused(checkpoints: Path, tmp_path: Path, name: str, part: str, message: str) -> None:
    def change(state: State) -> State:
        return {key: value for key, value in state.items() if f".{part}" not in key or "shared" in key}

    with pytest.raises(ModelError, match=f"not a whole mixture-of-experts MiniMind .* of 2 layers: {message}"):
        load_model(str(rewritten(checkpoints / f"{name}.pth", tmp_path / "x.pth", change)))


def test_a_transformers_too_old_for_a_mixture_is_named(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(ModelError, match=r"5\.14 or newer, and 5\.9\.1 is installed"):
        load_model(str(checkpoints / "minimind3-moe.pth"))
    load_model(str(checkpoints / "minimind3-dense.pth"))


def test_tensors_that_do_not_belong_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    def strange(state: State) -> None:
        state["model.layers.0.self_attn.k_proj.bias"] = torch.ones(2)

    def cut(state: State) -> None:
        state["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.ones(3, 3)

    def quantized(state: State) -> None:
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)

    for change, message in ((strange, "not part of one: .*bias"), (cut, "not a whole"), (quantized, "int8")):
        with pytest.raises(ModelError, match=message) as caught:
            load_model(str(rewritten(checkpoints / "minimind3-moe.pth", tmp_path / "x.pth", change)))
        assert "\n" not in str(caught.value)


LAYER = "model.layers.{}.input_layernorm.weight"
FIRST = "model.layers.0.self_attn."
# What a file of a stranger can hold. It filled the memory, or ended in a traceback.
ABSURD: dict[str, tuple[str, Callable[[State], State], str]] = {
    "a layer of ten digits": (
        "minimind3-dense", lambda state: {LAYER.format(9999999999): torch.ones(64)}, "not part of one: model.layers.9999999999."
    ),
    "a layer of nine digits": (
        "minimind3-dense", lambda state: {LAYER.format(999999999): torch.ones(64)}, "its keys number 1,000,000,000 layers, and"
    ),
    "a layer of 5,000 digits": (
        "minimind3-dense", lambda state: {LAYER.format("9" * 5000): torch.ones(64)}, "not part of one: model.layers.999"
    ),
    "an expert": (
        "minimind3-moe", lambda state: {"model.layers.0.mlp.experts.999999999.up_proj.weight": torch.ones(1)}, "1,000,000,000 exp"
    ),
    "a shared expert": (
        "minimind2-2510-moe",
        lambda state: {"model.layers.0.mlp.shared_experts.999999999.up_proj.weight": torch.ones(1)},
        "1,000,000,004 experts",
    ),
    "an expert of the first form": (
        "minimind2-2504-moe", lambda state: {"layers.0.feed_forward.experts.999999999.w1.weight": torch.ones(1)}, "1,000,000,001"
    ),
    "a gate of many experts": (
        "minimind3-moe", lambda state: {"model.layers.0.mlp.gate.weight": torch.ones(10**5, 1)}, "100,000 experts"
    ),
    "a norm of no width": (
        "minimind3-dense", lambda state: {FIRST + "q_norm.weight": torch.zeros(0)}, r"q_norm.weight has the shape \(0,\); expected"
    ),
    "a projection of no rows": (
        "minimind3-dense", lambda state: {FIRST + "k_proj.weight": torch.zeros(0, 64)}, r"k_proj.weight has the shape \(0, 64\)"
    ),
    "one number for a projection": (
        "minimind2-2510-dense", lambda state: {FIRST + "q_proj.weight": torch.tensor(1.0)}, r"q_proj.weight has the shape \(\)"
    ),
    "one number for a gate": (
        "minimind3-moe", lambda state: {"model.layers.0.mlp.gate.weight": torch.tensor(1.0)}, r"gate.weight has the shape \(\)"
    ),
    "a row for a projection": (
        "minimind2-2510-dense", lambda state: {FIRST + "o_proj.weight": torch.ones(64)}, r"o_proj.weight is \(64,\), expected \(64"
    ),
    "an embedding no multiple of the heads": (
        "minimind2-2510-dense",
        lambda state: dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.ones(400, 63)),
        "not a whole dense MiniMind 2510 checkpoint: ",
    ),
    "one number as a wide embedding": (
        "minimind3-dense",
        lambda state: dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.zeros(1).expand(10**6, 10**4)),
        "weight repeats few numbers as",
    ),
    "weights in each other": (
        "minimind3-dense",
        lambda state: {
            f"model.layers.{number}.mlp.up_proj.weight": torch.ones(2 * 10**6).as_strided((10**6, 64), (1, 1)) for number in (0, 1)
        },
        "weight repeats few numbers as",
    ),
    "narrow tensors of a wide model": (
        "minimind3-dense",
        lambda state: dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.ones(1, 10**6))
        | {"model.layers.0.mlp.gate_proj.weight": torch.ones(10**6, 1)},
        r"is \(64,\), expected \(1000000,\) beside the others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ABSURD)
def test_what_no_training_wrote_is_one_line(checkpoints: Path, tmp_path: Path, what: str) -> None:
    name, changed, message = ABSURD[what]
    file = rewritten(checkpoints / f"{name}.pth", tmp_path / "x.pth", lambda state: state | changed(state))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_lies_in_every_layer_is_no_model(tmp_path: Path) -> None:
    """A tied head alone is a copy of another weight."""
    state, wide = draw("minimind3-dense"), torch.ones(10**6, 64)
    for layer in (0, 1):
        state |= {f"model.layers.{layer}.mlp.{part}_proj.weight": wide for part in ("gate", "up")}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"its weights overlap: 1,0.* bytes in a file of 2"):
        load_model(str(tmp_path / "x.pth"))


def test_two_shared_experts_lie_side_by_side(tmp_path: Path) -> None:
    """They compute what the reference does, and both come back."""
    state, ids = draw("minimind2-2510-moe", shared=2), some_ids()
    torch.save(state, tmp_path / "two.pth")
    model = load_model(str(tmp_path / "two.pth")).model
    assert distance(logits_of(model, ids), reference_of("minimind2-2510-moe").compute(state, ids).logits) < TOLERANCE
    save_pth(model, tmp_path / "back.pth", "float32")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert state.keys() == back.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", NAMES)
def test_every_generation_is_scored_as_the_logits_of_its_reference_say(checkpoints: Path, name: str) -> None:
    model, batch = load_model(str(checkpoints / f"{name}.pth")).model, lay_out(random_pairs(6))
    logps = reference_of(name).compute(draw(name), batch.input_ids).logits.log_softmax(-1)
    logps = logps.flatten(0, 1)  # (rows x length, vocabulary)
    expected = logps[batch.sources].gather(1, batch.targets[:, None])[:, 0]
    with torch.no_grad():
        assert distance(Scorer(model, "float32")(batch).token_logps, expected) < TOLERANCE
        # Not the largest: where two experts score alike, rounding sends a token to the other one.
        assert (Scorer(model, "bfloat16")(batch).token_logps - expected).abs().median() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_stage_one_writes_what_dpo_in_the_original_would_compute(
    checkpoints: Path, minimind_tokenizers: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """From a file of pairs to mean logprobs: the tokenizer of transformers, the loss mask and the model of the references."""
    from transformers import AutoTokenizer

    reference, state, generation = reference_of(name), draw(name), name.rpartition("-")[0]
    rows, tokenizer = make_rows(6), AutoTokenizer.from_pretrained(minimind_tokenizers[generation])
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = {"tokenizer": str(minimind_tokenizers[generation]), "loss_on": "assistant"}
    precompute_into(tmp_path / "cache", checkpoints / f"{name}.pth", data, **options)
    cached = ReferenceCache(tmp_path / "cache").load()
    for row, means, counts in zip(rows, cached.reference.logp_mean, cached.reference.token_count, strict=True):
        for side, mean, count in zip(("chosen", "rejected"), means, counts, strict=True):
            ids, targets, mask = map(torch.tensor, shifted(*encode(tokenizer, generation, row[side], 1024)))
            logps = reference.compute(state, ids[None]).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
            assert mask.sum() == count
            assert logps[mask == 1].mean().item() == pytest.approx(mean, abs=TOLERANCE)
