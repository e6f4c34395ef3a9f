"""Adapters on a quantized base: both stages agree, every command follows the cache or the run, what is saved opens elsewhere."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheMismatch, ConfigError, ModelError
from minicache.models import load_model
from minicache.models.lora import add_lora
from minicache.models.precision import to_float32
from minicache.models.quantized import is_quantized, plain, quantized_layers
from minicache.options.base import QUANTIZATIONS, BaseOptions, flag_of
from minicache.options.lora import LoraOptions
from minicache.options.train import TrainConfig, ValidationOptions
from minicache.scoring.scorer import Scorer
from minicache.trackers import Silent
from tests.conftest import Cli, precompute_into
from tests.models.test_models import gguf_file
from tests.models.test_quantized import CPU, SETTINGS, by_transformers, each_kind, half_dir, stored
from tests.training import test_resume as resuming
from tests.training.test_lora import metrics, run

__all__ = ["gguf_file", "half_dir", "stored"]  # fixtures


def base(kind: str) -> BaseOptions:
    return BaseOptions(**{QUANTIZATIONS[kind]: True}) if kind else BaseOptions()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, half_dir: Path, data_file: Path) -> dict[str, Path]:
    """The 40 pairs scored by the tiny model as it is stored, and in each quantization."""
    directory = tmp_path_factory.mktemp("caches")
    return {
        kind: precompute_into(directory / (kind or "plain"), half_dir, data_file, base=base(kind))
        for kind in ("", *QUANTIZATIONS)
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, Path]) -> dict[str, Path]:
    """A run on each of the caches, which were not told again what their base is."""
    directory = tmp_path_factory.mktemp("runs")
    for kind in QUANTIZATIONS:
        run(caches[kind], directory / kind, lr=0.1, beta=0.1)
    return {kind: directory / kind for kind in QUANTIZATIONS}


@each_kind
def test_a_run_follows_its_cache_and_starts_at_ln_2(
    caches: dict[str, Path], runs: dict[str, Path], kind: str, half_dir: Path
) -> None:
    lines, facts = metrics(runs[kind]), json.loads((runs[kind] / "run.json").read_text())
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.01
    assert facts["handshake"] < 1e-5 and facts["quantization"] == kind and "base_4bit" not in facts
    told = json.loads((runs[kind] / "model" / "base.json").read_text())
    assert told == {"weights": load_model(str(half_dir)).fingerprint, "quantization": kind}


def test_the_identity_names_the_quantization_only_where_there_is_one(caches: dict[str, Path]) -> None:
    stored = {kind: ReferenceCache(cache).identity.stored for kind, cache in caches.items()}
    assert "quantization" not in stored[""]
    for kind in QUANTIZATIONS:
        assert stored[kind] == {**stored[""], "quantization": kind}
    means = {kind: ReferenceCache(cache).load().reference.logp_mean for kind, cache in caches.items()}
    assert np.abs(means["nf4-double"] - means[""]).max() > np.abs(means["int8"] - means[""]).max() > 1e-4


@pytest.mark.parametrize(
    ("made", "asked", "rank", "message"),
    [
        ("nf4-double", "", 0, "made with its base in nf4-double; quantized weights cannot be trained.*--lora-rank 16"),
        ("nf4-double", "int8", 2, "--base-8bit: .*made with its base in nf4-double, and the policy begins as the ref"),
        ("", "nf4-double", 2, "--base-4bit: .*made with its weights as they are stored, .*precompute-ref --base-4bit"),
    ],
)
def test_what_contradicts_the_cache_is_refused(
    caches: dict[str, Path], tmp_path: Path, made: str, asked: str, rank: int, message: str
) -> None:
    options: dict[str, Any] = {} if rank else {"lora": LoraOptions()}
    with pytest.raises((CacheMismatch, ConfigError), match=message) as error:
        run(caches[made], tmp_path / "run", base=base(asked), **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@each_kind
def test_all_weights_of_a_quantized_model_cannot_be_trained(
    caches: dict[str, Path], stored: dict[str, Path], tmp_path: Path, data_file: Path, kind: str
) -> None:
    with pytest.raises(ConfigError, match=f"{flag_of(kind)}: quantized weights cannot be trained, adapters .*rank 16"):
        TrainConfig(caches[kind], tmp_path / "run", base=base(kind))
    cache = precompute_into(tmp_path / "cache", stored[kind], data_file)
    with pytest.raises(ConfigError, match=r"its weights are quantized, which cannot be trained; .*--lora-rank 16"):
        run(cache, tmp_path / "run", lora=LoraOptions())


@each_kind
def test_the_option_may_be_given_again_and_chooses_for_other_weights(
    caches: dict[str, Path], half_dir: Path, runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    run(caches[kind], tmp_path / "same", lr=0.1, beta=0.1, base=base(kind))
    (first, second) = (
        load_file(out / "model" / "adapter_model.safetensors") for out in (runs[kind], tmp_path / "same")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "same" / "run.json").read_text())[QUANTIZATIONS[kind]] is True
    # on purpose from other weights: held as asked for, not as the cache was made
    run(caches[""], tmp_path / "other", init_from=str(half_dir), base=base(kind), max_steps=1)
    assert json.loads((tmp_path / "other" / "run.json").read_text())["quantization"] == kind


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_adapters_are_those_of_a_plain_loop(
    caches: dict[str, Path], half_dir: Path, kind: str, dtype: str
) -> None:
    table = ReferenceCache(caches[kind]).load().table
    models: list[Any] = [
        to_float32(load_model(str(half_dir), False, kind).model, CPU),
        plain(load_model(str(half_dir), False, kind).model),
    ]
    slopes: list[dict[str, Any]] = []
    for model in models:
        adapted = add_lora(model, "base", LoraOptions(lora_rank=2), seed=1, tracker=Silent())
        for number, (name, factor) in enumerate(adapted.named_parameters()):
            if "lora_B" in name:
                factor.data = torch.sin(torch.arange(factor.numel()) + number).view_as(factor) * 0.05
        scorer = Scorer(adapted, dtype)
        (_, batch), *_ = scorer.batches(table, np.arange(8), 10**6)
        scores = scorer(batch)
        (scores.logp_mean[:, 0] - scores.logp_mean[:, 1]).sigmoid().log().sum().neg().backward()
        slopes.append({name: each.grad for name, each in adapted.named_parameters() if each.requires_grad})
    mine, expected = slopes
    assert mine.keys() == expected.keys() and len(mine) == 2 * 2 * 7
    worst = max(float((mine[name] - expected[name]).norm() / expected[name].norm()) for name in mine)
    # under autocast both round at other places
    assert worst < (1e-5 if dtype == "float32" else 0.2)


@each_kind
def test_under_autocast_both_stages_agree_too(half_dir: Path, data_file: Path, tmp_path: Path, kind: str) -> None:
    cache = precompute_into(tmp_path / "cache", half_dir, data_file, base=base(kind), dtype="bfloat16")
    run(cache, tmp_path / "run", dtype="bfloat16", layout="packed")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["handshake"] < 1e-2
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_adapter_opens_with_peft_and_transformers_alone(half_dir: Path, runs: dict[str, Path]) -> None:
    from peft import PeftModel

    ids = torch.arange(3, 60)[None]
    settings = SETTINGS["nf4-double"] | {"bnb_4bit_compute_dtype": torch.float32}
    # embeddings, norms and head in float32, as minidpo holds them
    quantized = to_float32(by_transformers(half_dir, settings), CPU)
    theirs = PeftModel.from_pretrained(quantized, runs["nf4-double"] / "model").eval()
    ours = to_float32(load_model(str(runs["nf4-double"] / "model")).model, CPU)
    assert is_quantized(ours) and is_quantized(theirs)
    for layer in quantized_layers(theirs):
        # on some CPUs it would compute in bfloat16
        layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        found, expected = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@each_kind
def test_export_merges_into_the_weights_before_and_says_how_far_logprobs_move(
    caches: dict[str, Path], runs: dict[str, Path], half_dir: Path, tmp_path: Path, cli: Cli, kind: str
) -> None:
    code, stdout, stderr = cli("export", "--policy", runs[kind], "--out", tmp_path / "merged", "--json")
    assert code == 0, stderr
    moved = json.loads(stdout)["moved"]
    merged, weights = load_model(str(tmp_path / "merged")).model, load_model(str(half_dir)).model.state_dict()
    state = load_file(runs[kind] / "model" / "adapter_model.safetensors")
    for name, weight in weights.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = weight.double()
        if f"{stem}A.weight" in state:
            expected = expected + 2 * state[f"{stem}B.weight"].double() @ state[f"{stem}A.weight"].double()
        assert (merged.state_dict()[name].double() - expected).abs().max() < 1e-5, name
    cached = ReferenceCache(caches[kind]).load()
    chosen = np.unique(np.linspace(0, len(cached.table) - 1, 8).astype(int))
    means = []
    for model in (load_model(str(runs[kind] / "model")).model, merged):
        scorer = Scorer(to_float32(model, CPU), "float32")
        batches = list(scorer.batches(cached.table, chosen, 10**6))
        with torch.no_grad():
            means.append(torch.cat([scorer(batch).logp_mean for _, batch in batches]))
    by = (means[0] - means[1]).abs()
    assert moved["pairs"] == len(chosen) and moved["ref_cache"] == str(caches[kind])
    assert moved["mean"] == pytest.approx(float(by.mean()), abs=1e-5)
    assert moved["most"] == pytest.approx(float(by.max()), abs=1e-5)
    code, stdout, stderr = cli("export", "--policy", runs[kind], "--out", tmp_path / "again")
    assert "mean logprobs moved by" in stdout and f"8 pairs of {caches[kind]}" in stdout


def test_export_without_the_cache_says_that_nothing_was_measured(
    runs: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    lonely = shutil.copytree(runs["int8"] / "model", tmp_path / "adapter")
    code, stdout, stderr = cli("export", "--policy", lonely, "--out", tmp_path / "merged", "--json")
    assert code == 0 and json.loads(stdout)["moved"] is None
    assert "no run says on which cache" in " ".join(stderr.split())
    moved = shutil.copytree(runs["int8"], tmp_path / "run")
    facts = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(facts | {"ref_cache": str(tmp_path / "gone")}))
    code, stdout, stderr = cli("export", "--policy", moved, "--out", tmp_path / "merged2")
    assert (
        code == 0
        and "how far logprobs move is not measured" in " ".join(stderr.split())
        and "logprobs moved" not in stdout
    )


@each_kind
def test_a_stored_checkpoint_is_the_base_of_both_stages(
    stored: dict[str, Path], data_file: Path, tmp_path: Path, cli: Cli, kind: str
) -> None:
    cache = precompute_into(tmp_path / "cache", stored[kind], data_file)
    assert "quantization" not in ReferenceCache(cache).identity.stored
    run(cache, tmp_path / "run", validation=ValidationOptions(eval_cache=cache))
    line = metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6) and line["eval/loss"] == pytest.approx(line["loss"])
    code, stdout, stderr = cli("export", "--policy", tmp_path / "run", "--out", tmp_path / "merged", "--json")
    # there are no weights before: the policy is what it was
    assert code == 0 and json.loads(stdout)["moved"]["most"] < 1e-5, stderr
    assert not is_quantized(load_model(str(tmp_path / "merged")).model)
    code, stdout, stderr = cli("export", "--policy", stored[kind], "--out", tmp_path / "plain", "--dtype", "bfloat16")
    assert code == 0 and "in bfloat16" in stdout, stderr


@each_kind
def test_a_resumed_run_is_the_same_run(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = {"lora": LoraOptions(lora_rank=2), "lr": 1e-2, "async_save": True}
    resuming.run(caches[kind], tmp_path / "whole", **options)
    # after the second checkpoint began, which waits for the first
    resuming.killed_at(monkeypatch, 80, caches[kind], tmp_path / "run", **options)
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert json.loads((checkpoint / "model" / "base.json").read_text())["quantization"] == kind
    resuming.run(caches[kind], tmp_path / "run", resume=True, **options)
    resuming.assert_same_run(tmp_path / "whole", tmp_path / "run")


@each_kind
def test_other_commands_follow_the_run_and_the_cache(
    caches: dict[str, Path], runs: dict[str, Path], half_dir: Path, cli: Cli, kind: str
) -> None:
    code, stdout, stderr = cli("inspect-cache", caches[kind], "--verify", "--model", half_dir)
    assert code == 0 and "reproduces the sample" in stdout, stderr
    losses = {}
    for policy in (runs[kind], half_dir):
        code, stdout, stderr = cli("evaluate", "--policy", policy, "--ref-cache", caches[kind], "--json")
        assert code == 0, stderr
        losses[policy] = json.loads(stdout)
    assert losses[runs[kind]]["metrics"]["loss"] < 0.69
    # the weights are the same, what is computed with them is not
    assert not losses[half_dir]["same_weights"]
    code, stdout, stderr = cli("compare", "--policy", runs[kind], "--prompt", "why not", "--max-new-tokens", 4)
    assert code == 0, stderr


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("minimind2-2504-dense", marks=pytest.mark.slow),
        pytest.param("minimind2-2510-moe", marks=pytest.mark.slow),
        "minimind3-moe",
    ],
)
def test_the_base_may_be_a_minimind_file(
    checkpoints: Path, tokenizer_dir: Path, data_file: Path, tmp_path: Path, name: str, cli: Cli
) -> None:
    file = checkpoints / f"{name}.pth"
    cache = precompute_into(tmp_path / "cache", file, data_file, tokenizer=str(tokenizer_dir), base=base("nf4-double"))
    run(cache, tmp_path / "run", validation=ValidationOptions(eval_cache=cache))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and ("aux_loss" in lines[0]) == ("moe" in name)
    code, stdout, stderr = cli("export", "--policy", tmp_path / "run", "--out", tmp_path / "out.pth", "--json")
    assert code == 0 and json.loads(stdout)["moved"]["mean"] > 0, stderr


def test_the_base_may_be_a_gguf_file(gguf_file: Path, data_file: Path, tmp_path: Path) -> None:
    cache = precompute_into(tmp_path / "cache", gguf_file, data_file, base=base("nf4-double"))
    run(cache, tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_sweep_holds_its_base_as_the_cache_does(
    caches: dict[str, Path], runs: dict[str, Path], tmp_path: Path, cli: Cli
) -> None:
    given = ["--lora-rank", 2, "--batch-size", 8, "--max-steps", 6, "--log-every", 1, "--eval-cache", caches["int8"]]
    given += ["--beta", 0.1]
    code, _, stderr = cli(
        "sweep", "--ref-cache", caches["int8"], "--out", tmp_path / "sweep", "--lr", "0.1,1e-3", *given
    )
    assert code == 0, stderr
    mine = tmp_path / "sweep" / "lr-0.1"
    assert json.loads((mine / "run.json").read_text())["quantization"] == "int8"
    assert metrics(mine)[5]["loss"] == pytest.approx(metrics(runs["int8"])[5]["loss"], abs=1e-6)
    code, _, stderr = cli("sweep", "--ref-cache", caches["int8"], "--out", tmp_path / "no", "--lr", "1e-3", *given[2:])
    assert code == 1 and "quantized weights cannot be trained" in stderr


def test_an_adapter_on_a_quantized_base_is_continued_and_bears_no_other(
    runs: dict[str, Path], data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    model = runs["nf4-double"] / "model"
    cache = precompute_into(tmp_path / "cache", model, data_file)
    with pytest.raises(ConfigError, match=r"is an adapter on a quantized base; expected --continue-adapter, .* export"):
        run(cache, tmp_path / "run")
    with pytest.raises(ModelError, match="quantized already; leave --base-8bit out"):
        precompute_into(tmp_path / "other", model, data_file, base=base("int8"))
    run(cache, tmp_path / "run", lora=LoraOptions(continue_adapter=True))
    facts, told = (json.loads((tmp_path / "run" / name).read_text()) for name in ("run.json", "model/base.json"))
    assert facts["quantization"] == told["quantization"] == "nf4-double" and facts["handshake"] < 1e-5
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    code, _, stderr = cli("compare", "--policy", tmp_path / "run", "--prompt", "why not", "--max-new-tokens", 4)
    assert code == 0, stderr


def test_a_reference_may_be_an_adapter_that_was_merged_before_quantization(
    half_dir: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    plain_cache = precompute_into(tmp_path / "plain", half_dir, data_file)
    run(plain_cache, tmp_path / "sft", lr=0.1)
    sft = tmp_path / "sft" / "model"
    cache = precompute_into(tmp_path / "cache", sft, data_file, base=base("nf4-double"))
    with pytest.raises(ConfigError, match=r"--continue-adapter: the base was quantized with .*expected --lora-rank 16"):
        run(cache, tmp_path / "no", lora=LoraOptions(continue_adapter=True))
    report = run(cache, tmp_path / "run", validation=ValidationOptions(eval_cache=cache))
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    code, stdout, stderr = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", cache, "--json")
    assert code == 0 and json.loads(stdout)["metrics"]["loss"] == pytest.approx(report.progress.best, abs=1e-5), stderr
    code, stdout, stderr = cli("export", "--policy", tmp_path / "run", "--out", tmp_path / "merged", "--json")
    assert code == 0 and json.loads(stdout)["moved"]["mean"] > 0, stderr


@pytest.mark.parametrize("text", ['{"weights": "0", "quantization": "nf2"}', "[]", "{", "[" * 100_000])
def test_a_damaged_note_about_the_base_is_one_line(runs: dict[str, Path], tmp_path: Path, text: str) -> None:
    model = shutil.copytree(runs["int8"] / "model", tmp_path / "model")
    (model / "base.json").write_text(text)
    with pytest.raises(ModelError, match=r"base\.json: (cannot be read|expected a JSON object)") as error:
        load_model(str(model))
    assert "\n" not in str(error.value)
