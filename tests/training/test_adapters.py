"""Adapters on adapters: what a run saves opens elsewhere as the model that it trained; --continue-adapter; DoRA and rsLoRA."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.errors import CacheMismatch, ConfigError
from minicache.models import load_model
from minicache.options.train import LoraOptions, TrainConfig, ValidationOptions
from minicache.stages import train as stage
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training.loop import optimize
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.adapters import logits_elsewhere, sft_adapter
from tests.models.test_adapters import gpt2, mixtral, resized_elsewhere, saved

pytest.importorskip("peft", reason="needs peft: pip install '.[lora]'")
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "few.jsonl", make_rows(8))


@dataclass
class Trained:
    """A run, and the logits of its policy in memory at the end."""

    out: Path
    logits: torch.Tensor
    losses: list[float]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    def run(cache: Path, out: Path, **options: Any) -> Trained:
        kept: list[torch.Tensor] = []

        @torch.no_grad()
        def keeping(run: Any, *rest: Any) -> Any:
            with torch.enable_grad():
                outcome = optimize(run, *rest)
            kept.append(run.scorer.model(input_ids=IDS).logits[0])
            return outcome

        monkeypatch.setattr(stage, "optimize", keeping)
        settings = {"batch_size": 8, "max_steps": 3, "lr": 3e-2, "log_every": 1, "lora": LoraOptions(lora_rank=3)}
        settings["beta"] = 0.1
        train(TrainConfig(cache, out, **{**settings, **options}), one_process(), Silent())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return Trained(out, kept[-1], [line["loss"] for line in lines if "loss" in line])

    return run


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


JOINED: dict[str, tuple[dict[str, Any], LoraOptions]] = {
    "plain": ({"r": 4, "lora_alpha": 6}, LoraOptions(lora_rank=3)),
    "same modules": ({"r": 4, "target_modules": "all-linear"}, LoraOptions(lora_rank=2, lora_alpha=5.0)),
    "other modules": (
        {"target_modules": ["down_proj"]},
        LoraOptions(lora_rank=2, lora_targets="q_proj,layers.1.mlp.up_proj"),
    ),
    "rslora below": ({"r": 4, "use_rslora": True}, LoraOptions(lora_rank=3)),
    "rslora above": ({"r": 4}, LoraOptions(lora_rank=3, lora_rslora=True)),
    "patterns": (
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.o_proj": 7},
            "alpha_pattern": {"k_proj": 3},
            "use_rslora": True,
        },
        LoraOptions(lora_rank=3, lora_targets="q_proj,gate_proj"),
    ),
    "one layer": ({"layers_to_transform": [1]}, LoraOptions(lora_rank=3, lora_targets="q_proj")),
    "dropout": ({"lora_dropout": 0.5}, LoraOptions(lora_rank=3)),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, LoraOptions(lora_rank=3)),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, LoraOptions(lora_rank=3)),
    "embeddings on top": ({}, LoraOptions(lora_rank=3, lora_targets="embed_tokens,lm_head,q_proj")),
}
BESIDE: dict[str, tuple[str, dict[str, Any], LoraOptions]] = {
    "dora below": ("LoraConfig", {"use_dora": True}, LoraOptions(lora_rank=3)),
    "dora above": ("LoraConfig", {}, LoraOptions(lora_rank=3, lora_dora=True)),
    "bias": ("LoraConfig", {"bias": "all"}, LoraOptions(lora_rank=3)),
    "whole layers": ("LoraConfig", {"modules_to_save": ["lm_head", "embed_tokens"]}, LoraOptions(lora_rank=3)),
    "tokens": ("LoraConfig", {"trainable_token_indices": [3, 7, 11]}, LoraOptions(lora_rank=3)),
    "ia3": ("IA3Config", {"feedforward_modules": [], "target_modules": ["k_proj", "v_proj"]}, LoraOptions(lora_rank=3)),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 4}, LoraOptions(lora_rank=3)),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa"}, LoraOptions(lora_rank=3)),
}


@pytest.mark.parametrize("name", JOINED)
def test_an_adapter_on_an_adapter_is_saved_as_one(
    name: str, model_dir: Path, few: Path, tmp_path: Path, trained: Callable[..., Trained], cli: Cli
) -> None:
    settings, lora = JOINED[name]
    sft = sft_adapter(model_dir, tmp_path / "sft", **settings)
    cache = precompute_into(tmp_path / "cache", sft, few)
    run = trained(cache, tmp_path / "run", lora=lora)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and run.losses[-1] < run.losses[0] - 0.01
    config = json.loads((run.out / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir) and not (run.out / "base").exists()
    same(logits_elsewhere(run.out / "model", IDS), run.logits)
    same(load_model(str(run.out / "model")).model(input_ids=IDS).logits[0], run.logits)
    code, stdout, stderr = cli("evaluate", "--policy", run.out, "--ref-cache", cache, "--json")
    assert code == 0 and json.loads(stdout)["metrics"]["loss"] < run.losses[0], stderr


@pytest.mark.parametrize("name", BESIDE)
def test_what_cannot_be_one_adapter_has_its_merged_base_beside_it(
    name: str, model_dir: Path, few: Path, tmp_path: Path, trained: Callable[..., Trained], cli: Cli
) -> None:
    kind, settings, lora = BESIDE[name]
    sft = sft_adapter(model_dir, tmp_path / "sft", kind=kind, **settings)
    cache = precompute_into(tmp_path / "cache", sft, few)
    run = trained(cache, tmp_path / "run", lora=lora)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5) and run.losses[-1] < run.losses[0] - 0.01
    config = json.loads((run.out / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.out / "base")
    assert (run.out / "base" / "tokenizer.json").is_file()
    same(logits_elsewhere(run.out / "model", IDS), run.logits)
    run.out.rename(tmp_path / "moved")
    same(load_model(str(tmp_path / "moved" / "model")).model(input_ids=IDS).logits[0], run.logits)
    code, _, stderr = cli("export", "--policy", tmp_path / "moved", "--out", tmp_path / "merged")
    assert code == 0, stderr
    same(load_model(str(tmp_path / "merged")).model(input_ids=IDS).logits[0], run.logits)


CONTINUED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "bias": ("LoraConfig", {"bias": "lora_only"}),
    "whole layers": ("LoraConfig", {"modules_to_save": ["lm_head"]}),
    "tokens": ("LoraConfig", {"trainable_token_indices": [3, 7, 11]}),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_reference_s_adapter_goes_on(
    name: str, model_dir: Path, few: Path, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    kind, settings = CONTINUED[name]
    sft = sft_adapter(model_dir, tmp_path / "sft", kind=kind, **settings)
    cache = precompute_into(tmp_path / "cache", sft, few)
    run = trained(cache, tmp_path / "run", lora=LoraOptions(continue_adapter=True))
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5) and run.losses[-1] < run.losses[0] - 0.001
    before, after = (json.loads((place / "adapter_config.json").read_text()) for place in (sft, run.out / "model"))
    assert {key for key in before if before[key] != after[key]} <= {"base_model_name_or_path", "target_modules"}
    assert sorted(before["target_modules"]) == sorted(after["target_modules"])
    assert after["base_model_name_or_path"] == str(model_dir)
    same(logits_elsewhere(run.out / "model", IDS), run.logits)
    assert json.loads((run.out / "run.json").read_text())["continue_adapter"] is True


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraOptions(lora_rank=3), LoraOptions(continue_adapter=True)])
@pytest.mark.parametrize("kind", ["joined", "beside"])
def test_runs_on_adapters_resume_bit_for_bit(
    kind: str,
    lora: LoraOptions,
    model_dir: Path,
    few: Path,
    tmp_path: Path,
    trained: Callable[..., Trained],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = sft_adapter(model_dir, tmp_path / "inner", target_modules=["q_proj", "up_proj"], lora_alpha=3)
    # an adapter whose base is an adapter, as 0.1.0 wrote it
    sft = based_on(inner, sft_adapter(model_dir, tmp_path / "sft", seed=1, use_dora=kind == "beside"))
    cache = precompute_into(tmp_path / "cache", sft, few)
    whole = trained(cache, tmp_path / "whole", lora=lora, max_steps=4, save_every=2)

    def save_policy(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "save_policy", save_policy)
        trained(cache, tmp_path / "cut", lora=lora, max_steps=4, save_every=2)
    assert (tmp_path / "cut" / "checkpoints" / "step-000002").is_dir()
    again = trained(cache, tmp_path / "cut", lora=lora, max_steps=4, save_every=2, resume=True)
    assert torch.equal(again.logits, whole.logits)
    same(logits_elsewhere(again.out / "model", IDS), whole.logits)


def based_on(base: Path, adapter: Path) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))
    return adapter


def test_the_best_of_joined_adapters_is_saved(
    model_dir: Path, few: Path, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    sft = sft_adapter(model_dir, tmp_path / "sft")
    cache = precompute_into(tmp_path / "cache", sft, few)
    validation = ValidationOptions(eval_cache=cache, eval_every=1)
    run = trained(cache, tmp_path / "run", validation=validation)
    best = json.loads((run.out / "run.json").read_text())["outcome"]["progress"]["best"]
    from minicache.options.others import EvaluateConfig
    from minicache.stages.evaluate import evaluate

    found = evaluate(EvaluateConfig(policy=str(run.out), ref_cache=cache), one_process(), Silent())
    assert found.metrics["loss"] == pytest.approx(best, abs=1e-6)


def random_model(family: str, place: Path, tokenizer: Path) -> Path:
    model = gpt2() if family == "gpt2" else mixtral()
    return saved(model, place, tokenizer)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", "c_attn"),
        ("gpt2", "attn.c_proj,h.1.mlp.c_fc"),
        ("gpt2", "all-linear"),
        ("mixtral", "all-linear"),
        ("mixtral", "q_proj,experts.gate_up_proj"),
        ("mixtral", "w1,w3"),
        ("mixtral", "q_proj"),
    ],
)
def test_targets_of_other_families(
    family: str, names: str, tokenizer_dir: Path, few: Path, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    base = random_model(family, tmp_path / "base", tokenizer_dir)
    cache = precompute_into(tmp_path / "cache", base, few)
    run = trained(cache, tmp_path / "run", lora=LoraOptions(lora_rank=2, lora_targets=names))
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and run.losses[-1] < run.losses[0] - 1e-3
    same(logits_elsewhere(run.out / "model", IDS), run.logits)
    same(load_model(str(run.out / "model")).model(input_ids=IDS).logits[0], run.logits)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "below"), [("gpt2", "c_attn"), ("mixtral", "q_proj"), ("mixtral", "all-linear")])
@pytest.mark.parametrize("lora", [LoraOptions(lora_rank=2), LoraOptions(continue_adapter=True)])
def test_adapters_on_adapters_of_other_families(
    family: str,
    below: str,
    lora: LoraOptions,
    tokenizer_dir: Path,
    few: Path,
    tmp_path: Path,
    trained: Callable[..., Trained],
) -> None:
    base = random_model(family, tmp_path / "base", tokenizer_dir)
    named = below if below == "all-linear" else [below]
    sft = sft_adapter(base, tmp_path / "sft", target_modules=named, fan_in_fan_out=family == "gpt2")
    cache = precompute_into(tmp_path / "cache", sft, few)
    run = trained(cache, tmp_path / "run", lora=lora)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5) and run.losses[-1] < run.losses[0] - 1e-3
    assert (run.out / "base").exists() == (family == "mixtral" and not lora.continue_adapter)
    same(logits_elsewhere(run.out / "model", IDS), run.logits)
    same(load_model(str(run.out / "model")).model(input_ids=IDS).logits[0], run.logits)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraOptions(lora_rank=2), LoraOptions(continue_adapter=True)])
def test_an_adapter_with_more_tokens_than_its_base(
    lora: LoraOptions, model_dir: Path, few: Path, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    sft = sft_adapter(model_dir, tmp_path / "sft", before=lambda model: model.resize_token_embeddings(411))
    cache = precompute_into(tmp_path / "cache", sft, few)
    run = trained(cache, tmp_path / "run", lora=lora)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-5) and run.logits.shape[1] == 411
    same(load_model(str(run.out / "model")).model(input_ids=IDS).logits[0], run.logits)
    if lora.lora_rank:
        same(logits_elsewhere(run.out / "model", IDS), run.logits)
    else:
        with torch.no_grad():
            same(resized_elsewhere(run.out / "model", model_dir)(input_ids=IDS).logits[0], run.logits)


def test_continuing_without_an_adapter_is_refused(ref_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--continue-adapter: .* is no adapter; expected one, or --lora-rank 16"):
        train(
            TrainConfig(ref_cache, tmp_path / "run", lora=LoraOptions(continue_adapter=True)), one_process(), Silent()
        )
    with pytest.raises(ConfigError, match="expected a new adapter or the reference's own, got both"):
        LoraOptions(lora_rank=2, continue_adapter=True)
    with pytest.raises(ConfigError, match=r"--lora-dropout: expected 0, got 0.05; with dropout, policy and reference"):
        LoraOptions(lora_rank=2, lora_dropout=0.05)


def test_another_adapter_is_not_the_reference(model_dir: Path, few: Path, tmp_path: Path) -> None:
    first, second = (sft_adapter(model_dir, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    cache = precompute_into(tmp_path / "cache", first, few)
    config = TrainConfig(cache, tmp_path / "run", model=str(second), lora=LoraOptions(continue_adapter=True))
    with pytest.raises(CacheMismatch, match="weights digest"):
        train(config, one_process(), Silent())


@pytest.mark.parametrize("lora", [LoraOptions(lora_rank=3, lora_dora=True), LoraOptions(lora_rank=4, lora_rslora=True)])
def test_dora_and_rslora_on_a_plain_base(
    lora: LoraOptions, model_dir: Path, few: Path, ref_cache: Path, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    run = trained(ref_cache, tmp_path / "run", lora=lora)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-6) and run.losses[-1] < run.losses[0] - 0.001
    config = json.loads((run.out / "model" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (lora.lora_dora, lora.lora_rslora)
    same(logits_elsewhere(run.out / "model", IDS), run.logits)
    record = json.loads((run.out / "run.json").read_text())
    assert ("lora_dora" in record, "lora_rslora" in record) == (lora.lora_dora, lora.lora_rslora)
    assert not {"continue_adapter", "lora_dropout"} & record.keys()
