"""LoRA: only adapters train, the base stays bit for bit, and every stage takes the adapter's directory for a model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheMismatch, ConfigError
from minicache.models import load_model
from minicache.options.train import LoraOptions, TrainConfig, ValidationOptions
from minicache.stages import train as stage
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training.loop import optimize
from minicache.training.progress import Outcome
from minicache.training.state import Run
from tests.conftest import Cli, make_rows, one_process, precompute_into, tiny_llama, write_jsonl
from tests.models.test_models import gguf_file

__all__ = ["gguf_file"]  # a fixture


def run(ref_cache: Path, out: Path, rank: int = 2, **options: Any) -> TrainReport:
    settings = {"batch_size": 8, "max_steps": 6, "lr": 1e-2, "log_every": 1, "lora": LoraOptions(lora_rank=rank)}
    return train(TrainConfig(ref_cache, out, **{**settings, **options}), one_process(), Silent())


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, ref_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    run(ref_cache, out, lora=LoraOptions(lora_rank=2, lora_alpha=5.0))
    return out


def test_a_run_starts_at_ln_2_and_leaves_a_small_directory(adapted: Path) -> None:
    lines = metrics(adapted)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["loss"] < lines[0]["loss"] - 0.01
    names = {file.name for file in (adapted / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    state = load_file(adapted / "model" / "adapter_model.safetensors")
    assert all("lora_" in name for name in state) and len(state) == 2 * 2 * 7  # factors x layers x linear modules


def test_only_adapters_train(ref_cache: Path, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.nn.Module] = []

    def keeping(run: Run, *rest: Any) -> Outcome:
        kept.append(run.scorer.model)
        return optimize(run, *rest)

    monkeypatch.setattr(stage, "optimize", keeping)
    run(ref_cache, tmp_path / "run")
    (policy,) = kept
    base = load_model(str(model_dir)).model.state_dict()
    trained = {name for name, value in policy.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    seen = 0
    for name, value in policy.state_dict().items():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[plain].float()), name
            seen += 1
    assert seen == len(base)


def test_the_exported_policy_is_the_base_and_the_scaled_product(
    adapted: Path, model_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "merged"
    code, stdout, stderr = cli("export", "--policy", adapted, "--out", out)
    assert code == 0 and "in float32" in stdout, stderr
    merged, base = load_model(str(out)).model.state_dict(), load_model(str(model_dir)).model.state_dict()
    state = load_file(adapted / "model" / "adapter_model.safetensors")
    moved = 0
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = weight.double()
        if f"{stem}A.weight" in state:
            expected = expected + 5.0 / 2 * state[f"{stem}B.weight"].double() @ state[f"{stem}A.weight"].double()
            moved += 1
        assert (merged[name].double() - expected).abs().max() < 1e-6, name
    assert moved == 14 and merged.keys() == base.keys()
    assert (out / "tokenizer.json").is_file() and not (out / "adapter_config.json").exists()


def test_other_commands_take_the_run_and_its_checkpoints(
    adapted: Path, ref_cache: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the adapter names its base by a whole path
    values = {}
    cli("export", "--policy", adapted, "--out", "merged")
    for policy in (adapted, adapted / "model", "merged"):
        code, stdout, stderr = cli("evaluate", "--policy", policy, "--ref-cache", ref_cache, "--json")
        assert code == 0, stderr
        found = json.loads(stdout)
        assert not found["same_weights"]
        values[str(policy)] = found["metrics"]["loss"]
    assert max(values.values()) - min(values.values()) < 1e-6 and max(values.values()) < 0.69
    code, stdout, stderr = cli("compare", "--policy", adapted, "--prompt", "why not", "--max-new-tokens", 4)
    assert code == 0, stderr


def test_an_adapter_knows_its_base(model_dir: Path, ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    run(ref_cache, tmp_path / "run", model=str(model), max_steps=1)
    tiny_llama(seed=1).save_pretrained(model)
    code, _, stderr = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", ref_cache)
    assert code == 1 and "an adapter of weights" in stderr and "expected the same" in stderr
    shutil.rmtree(model)
    code, _, stderr = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", ref_cache)
    assert code == 1 and "the base model of this adapter" in stderr and "base_model_name_or_path" in stderr
    shutil.copytree(model_dir, model)
    (tmp_path / "run" / "model" / "base.json").write_text("{}")
    code, _, stderr = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", ref_cache)
    assert code == 1 and "base.json: cannot be read" in stderr


def test_a_relative_model_is_found_from_elsewhere(
    model_dir: Path, ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    shutil.copytree(model_dir, tmp_path / "here" / "sft")
    monkeypatch.chdir(tmp_path / "here")
    run(ref_cache, tmp_path / "run", model="sft", max_steps=1)
    monkeypatch.chdir(tmp_path)
    code, _, stderr = cli("evaluate", "--policy", "run", "--ref-cache", ref_cache)
    assert code == 0, stderr


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "no linear modules named q_prj; expected all-linear, or some of .*gate_proj"),
        ("q_proj, v_prj", "no linear modules named v_prj; expected"),
        ("mlp", "no linear modules named mlp; expected"),
    ],
)
def test_targets_that_are_not_there(ref_cache: Path, tmp_path: Path, targets: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--lora-targets: the model has {message}") as error:
        run(ref_cache, tmp_path / "run", lora=LoraOptions(lora_rank=2, lora_targets=targets))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [(" , ", "expected all-linear, or names of modules"), ("all-linear,lm_head", "all-linear names all of them")],
)
def test_targets_that_name_nothing_or_too_much(ref_cache: Path, tmp_path: Path, targets: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(ref_cache, tmp_path / "run", lora=LoraOptions(lora_rank=2, lora_targets=targets))


def test_named_targets_alone_are_adapted(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "run", max_steps=1, lora=LoraOptions(lora_rank=2, lora_targets="q_proj, v_proj"))
    state = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in state} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("option", [{"lora_alpha": 4.0}, {"lora_targets": "q_proj"}])
def test_an_option_of_adapters_without_adapters_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is used with --lora-rank only; expected both"):
        LoraOptions(**option)


def test_the_best_adapter_is_the_one_that_stays(ref_cache: Path, tmp_path: Path) -> None:
    options = ValidationOptions(holdout=0.3, eval_every=1)
    report = run(ref_cache, tmp_path / "run", lr=0.3, validation=options)
    assert report.model_step < report.progress.step
    best = tmp_path / "run" / "checkpoints" / f"step-{report.model_step:06d}" / "model" / "adapter_model.safetensors"
    assert (report.model_dir / "adapter_model.safetensors").read_bytes() == best.read_bytes()
    assert (report.model_dir / "tokenizer.json").is_file()


def test_a_changed_base_is_refused_when_the_run_goes_on(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    cache = precompute_into(tmp_path / "cache", model, data_file)
    monkeypatch.setattr(stage, "save_policy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(cache, tmp_path / "run", save_every=2)
    tiny_llama(seed=1).save_pretrained(model)
    with pytest.raises(CacheMismatch, match="weights digest"):
        run(cache, tmp_path / "run", save_every=2, resume=True)


@pytest.mark.parametrize("name", ["minimind2-2504-dense", "minimind2-2504-moe", "minimind3-moe"])
def test_adapters_of_a_minimind_file(
    checkpoints: Path, tokenizer_dir: Path, tmp_path: Path, name: str, cli: Cli
) -> None:
    file = checkpoints / f"{name}.pth"
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(8))
    cache = precompute_into(tmp_path / "cache", file, data, tokenizer=str(tokenizer_dir))
    report = run(cache, tmp_path / "run", validation=ValidationOptions(eval_cache=cache), balance=0.1)
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and report.model_step > 0
    assert ("aux_loss" in lines[0]) == name.endswith("moe")
    code, _, stderr = cli("export", "--policy", tmp_path / "run", "--out", tmp_path / "out.pth", "--dtype", "float32")
    assert code == 0, stderr
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "out.pth"))
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    for policy in ("run", "out.pth"):  # merged, and as it was in training
        code, stdout, stderr = cli("evaluate", "--policy", tmp_path / policy, "--ref-cache", cache, "--json")
        assert json.loads(stdout)["metrics"]["loss"] == pytest.approx(report.progress.best, abs=1e-5)
    assert ReferenceCache(cache).log.model == json.loads((tmp_path / "run" / "run.json").read_text())["started_from"]


def test_adapters_of_a_gguf_file(gguf_file: Path, data_file: Path, tmp_path: Path, cli: Cli) -> None:
    cache = precompute_into(tmp_path / "cache", gguf_file, data_file)
    report = run(cache, tmp_path / "run", validation=ValidationOptions(eval_cache=cache))
    code, _, stderr = cli("export", "--policy", tmp_path / "run", "--out", tmp_path / "merged")
    assert code == 0 and report.model_step > 0, stderr
    for policy in ("run", "merged"):
        code, stdout, stderr = cli("evaluate", "--policy", tmp_path / policy, "--ref-cache", cache, "--json")
        assert json.loads(stdout)["metrics"]["loss"] == pytest.approx(report.progress.best, abs=1e-5), stderr
