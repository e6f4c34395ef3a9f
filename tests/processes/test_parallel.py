"""The same run on 1, 2 and 4 processes, each with a whole copy of the model or with shards of it: one curve, one cache.

Real processes over gloo. Those of one world run all its jobs one after another: starting them takes longer than the work.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicache.cache.reader import ReferenceCache
from minicache.options.dictionaries import fill
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.worlds import start_world

# 20 pairs in batches of 6: the last is of 2, fewer than the processes; micro-batches differ in number from rank to rank
SETTINGS: dict[str, Any] = {
    "batch_size": 6,
    "epochs": 2,
    "lr": 1e-3,
    "log_every": 1,
    "tokens_per_micro_batch": 150,
    "save_every": 3,
    "keep_last": 10,
    "beta": 0.1,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"activation_checkpointing": True, "loss": "ipo"},
    "validated": {"holdout": 0.3, "eval_every": 2},
    "async": {"async_save": True},
    "lora async": {"lora_rank": 4, "async_save": True},
    "tied": {},
    # balances each step; another balances each sequence
    "mixture": {"holdout": 0.3, "eval_every": 2},
    "mixture lora": {"lora_rank": 4},
    "mixture sequences": {"balance": 0.1},
}
# world size -> runs: kind, parallel
RUNS = {
    2: [
        ("plain", "ddp"),
        ("plain", "fsdp"),
        ("async", "ddp"),
        ("async", "fsdp"),
        ("lora async", "fsdp"),
        ("checkpointed", "fsdp"),
        ("validated", "fsdp"),
        *((kind, how) for kind in ("tied", "mixture", "mixture lora") for how in ("ddp", "fsdp")),
        ("mixture sequences", "ddp"),
    ],
    4: [("plain", "fsdp"), ("plain", "hybrid")],
}


def run_world(size: int, jobs: list[tuple[str, dict[str, Any]]], directory: Path) -> None:
    """All jobs in `size` processes, two to a node."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "jobs.json").write_text(json.dumps(jobs, default=str))
    worker = ("-W", "error", "-m", "tests.processes.parallel_worker", directory / "jobs.json")
    processes = start_world(size, *worker, per_node=2, stderr=subprocess.PIPE)
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), told[0][-3000:]


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_curve(left: Path, right: Path, tolerance: float = 1e-5) -> None:
    a, b = lines(left), lines(right)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for mine, its in zip(a, b, strict=True):
        assert mine.keys() == its.keys()
        for name in ("loss", "logps/chosen", "rewards/margin", "aux_loss", "eval/loss", "eval/aux_loss"):
            assert mine.get(name, 0) == pytest.approx(its.get(name, 0), abs=tolerance), (mine["step"], name)
        assert mine.get("grad_norm", 0) == pytest.approx(its.get("grad_norm", 0), rel=1e-3)
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    # Adam divides by the gradient's own size: where that is rounding noise, a weight may move by a whole step
    assert np.mean([(one[name] - other[name]).abs().mean() for name in one]) < 1e-5


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("few")
    return precompute_into(directory / "cache", model_dir, write_jsonl(directory / "pairs.jsonl", make_rows(20)))


def options_of(kind: str, few: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {**SETTINGS, **KINDS[kind], "ref_cache": str(few), "out": str(out), **more}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A cache of 20 pairs, made with a model whose head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tied")
    config = LlamaConfig(**{**LlamaConfig.from_pretrained(model_dir).to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(0)
    shutil.copytree(model_dir, directory / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    return precompute_into(directory / "cache", directory / "model", write_jsonl(directory / "x.jsonl", make_rows(20)))


@pytest.fixture(scope="module")
def caches(
    few: Path, tied: Path, checkpoints: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Caches of 20 pairs, by kind of run."""
    directory = tmp_path_factory.mktemp("mixtures")
    data, tokenizer = write_jsonl(directory / "pairs.jsonl", make_rows(20)), str(tokenizer_dir)
    files = {name: checkpoints / f"minimind{name}-moe.pth" for name in ("3", "2-2504")}
    made = {name: precompute_into(directory / name, file, data, tokenizer=tokenizer) for name, file in files.items()}
    mixtures = {"mixture": made["3"], "mixture lora": made["3"], "mixture sequences": made["2-2504"]}
    return dict.fromkeys(KINDS, few) | {"tied": tied} | mixtures


@pytest.fixture(scope="module")
def runs(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a run by kind, world size and parallel; each world's are run together, when first asked for."""
    directory = tmp_path_factory.mktemp("runs")

    def get(kind: str, size: int = 1, parallel: str = "ddp") -> Path:
        out = directory / f"{kind}-{size}-{parallel}"
        if not out.exists() and size == 1:
            train(fill(TrainConfig, options_of(kind, caches[kind], out)), one_process(), Silent())
        elif not out.exists():
            jobs = [
                ("train", options_of(kind, caches[kind], directory / f"{kind}-{size}-{how}", parallel=how))
                for kind, how in RUNS[size]
            ]
            run_world(size, jobs, directory / f"world-{size}")
        return out

    return get


@pytest.mark.parametrize(
    ("kind", "size", "parallel"),
    [
        pytest.param(kind, size, how, marks=[pytest.mark.slow] if size > 2 else [])
        for size, all_ in RUNS.items()
        for kind, how in all_
    ],
)
def test_any_number_of_processes_gives_the_curve_of_one(
    kind: str, size: int, parallel: str, runs: Callable[..., Path]
) -> None:
    assert_same_curve(runs(kind), runs(kind, size, parallel))


@pytest.mark.slow
def test_gradients_are_there_once(few: Path, tmp_path: Path) -> None:
    """DDP's buckets hold them, in every micro-batch of every step."""
    options = options_of("plain", few, tmp_path / "none", tokens_per_micro_batch=80, dtype="float32")
    run_world(2, [("buckets", options), ("buckets", {**options, "lora_rank": 2})], tmp_path / "world")


def test_what_does_not_fit_on_one_process_is_loaded_by_none(few: Path, tmp_path: Path) -> None:
    jobs = [("refused", options_of("plain", few, tmp_path / "run", parallel=how)) for how in ("ddp", "fsdp")]
    run_world(2, jobs, tmp_path / "world")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_shards_of_a_tied_model_write_its_head_once_and_go_on(tied: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = options_of("plain", tied, tmp_path / "run", parallel="fsdp")
    jobs = [("train", options), ("train", {**options, "out": str(tmp_path / "async"), "async_save": True})]
    run_world(2, jobs, tmp_path / "world")
    for place in (
        tmp_path / "run" / "model",
        tmp_path / "async" / "model",
        tmp_path / "run/checkpoints/step-000003/model",
    ):
        assert "lm_head.weight" not in load_file(place / "model.safetensors")
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "run" / "model", output_loading_info=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not any(info.values())
    out = cut(tmp_path / "run", tmp_path / "resumed", 3)
    train(fill(TrainConfig, options_of("plain", tied, out, resume=True)), one_process(), Silent())
    assert_same_curve(tmp_path / "run", out)


def cut(run: Path, out: Path, step: int) -> Path:
    """A copy of a finished run as if it had been killed after the checkpoint at `step`."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    facts = json.loads((out / "run.json").read_text())
    del facts["outcome"]
    (out / "run.json").write_text(json.dumps(facts))
    for place in (out / "checkpoints").iterdir():
        if place.name > f"step-{step:06d}":
            shutil.rmtree(place)
    return out


@pytest.mark.slow
def test_a_checkpoint_of_four_shards_goes_on_in_one_process(
    few: Path, runs: Callable[..., Path], tmp_path: Path
) -> None:
    out = cut(runs("plain", 4, "fsdp"), tmp_path / "run", 3)
    train(fill(TrainConfig, options_of("plain", few, out, resume=True)), one_process(), Silent())
    assert_same_curve(runs("plain"), out)


def test_checkpoints_go_on_in_another_world(few: Path, runs: Callable[..., Path], tmp_path: Path) -> None:
    """Of two shards in two copies; of one process in two shards; adapters of two shards in two copies."""
    moved = [("plain", 2, "fsdp", "ddp"), ("async", 1, "ddp", "fsdp"), ("lora async", 2, "fsdp", "ddp")]
    outs = [cut(runs(kind, size, how), tmp_path / f"run-{at}", 3) for at, (kind, size, how, _) in enumerate(moved)]
    jobs = [
        ("train", options_of(kind, few, out, resume=True, parallel=then))
        for out, (kind, _, _, then) in zip(outs, moved, strict=True)
    ]
    run_world(2, jobs, tmp_path / "world")
    for out, (kind, *_) in zip(outs, moved, strict=True):
        assert_same_curve(runs(kind), out)


@pytest.mark.slow
def test_a_stop_of_one_process_within_a_validation_ends_all_and_loses_nothing(
    few: Path, runs: Callable[..., Path], tmp_path: Path
) -> None:
    jobs = []
    for how in ("ddp", "fsdp"):
        options = options_of("validated", few, tmp_path / how, parallel=how, tokens_per_micro_batch=60)
        jobs += [("stopped", options), ("train", {**options, "resume": True})]
    run_world(2, jobs, tmp_path / "world")
    for how in ("ddp", "fsdp"):
        assert_same_curve(runs("validated"), tmp_path / how)


def test_shards_score_the_cache_that_one_process_scores(few: Path, model_dir: Path, tmp_path: Path) -> None:
    """Three blocks on two processes, the second with fewer pairs: each waits for the other in every forward pass."""
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(20))
    options = {
        "model": str(model_dir),
        "data": [str(data)],
        "tokens_per_batch": 150,
        "block_pairs": 8,
        "parallel": "fsdp",
    }
    run_world(2, [("precompute", {**options, "ref_cache": str(tmp_path / "cache")})], tmp_path / "world")
    expected, found = ReferenceCache(few).load(), ReferenceCache(tmp_path / "cache").load()
    assert np.array_equal(expected.table.digest, found.table.digest)
    assert np.abs(expected.reference.logp_mean - found.reference.logp_mean).max() < 1e-5
