"""A quantized base on two processes: a copy on each gives the run of one; shards are refused by all of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from minicache.cache.reader import ReferenceCache
from minicache.options.base import QUANTIZATIONS, BaseOptions
from minicache.options.dictionaries import fill
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl
from tests.processes.test_parallel import run_world

SETTINGS: dict[str, Any] = {"batch_size": 6, "epochs": 2, "lr": 1e-2, "log_every": 1, "lora_rank": 2}


@pytest.mark.slow
def test_two_processes_with_a_copy_each_give_the_run_of_one(model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(20))
    jobs: list[tuple[str, dict[str, Any]]] = []
    for kind, option in QUANTIZATIONS.items():
        cache, made = tmp_path / f"cache-{kind}", tmp_path / f"two-cache-{kind}"
        precompute_into(cache, model_dir, data, base=BaseOptions(**{option: True}))
        options = {"model": str(model_dir), "data": [str(data)], "ref_cache": str(made), "block_pairs": 8, option: True}
        jobs += [("precompute", options)]
        jobs += [("train", {**SETTINGS, "ref_cache": str(cache), "out": str(tmp_path / f"two-{kind}")})]
        train(
            fill(TrainConfig, {**SETTINGS, "ref_cache": str(cache), "out": tmp_path / f"one-{kind}"}),
            one_process(),
            Silent(),
        )
    run_world(2, jobs, tmp_path / "world")
    for kind in QUANTIZATIONS:
        first, second = (ReferenceCache(tmp_path / f"{name}cache-{kind}") for name in ("", "two-"))
        assert first.identity == second.identity
        means = [cache.load().reference.logp_mean for cache in (first, second)]
        assert np.abs(means[0] - means[1]).max() < 1e-5
        lines = [
            [json.loads(line) for line in (tmp_path / f"{name}-{kind}" / "metrics.jsonl").read_text().splitlines()]
            for name in ("one", "two")
        ]
        for mine, other in zip(*lines, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        state = [
            load_file(tmp_path / f"{name}-{kind}" / "model" / "adapter_model.safetensors") for name in ("one", "two")
        ]
        assert max(float((state[0][name] - state[1][name]).abs().mean()) for name in state[0]) < 1e-4


@pytest.mark.slow
def test_shards_of_a_quantized_base_are_refused_by_all_processes(model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(8))
    cache = precompute_into(tmp_path / "cache", model_dir, data, base=BaseOptions(base_4bit=True))
    options = {**SETTINGS, "ref_cache": str(cache), "out": str(tmp_path / "run"), "parallel": "fsdp"}
    with pytest.raises(AssertionError, match="--parallel fsdp: quantized weights cannot be sharded; expected --pa"):
        run_world(2, [("train", options)], tmp_path / "world")
    again = {"model": str(model_dir), "data": [str(data)], "ref_cache": str(tmp_path / "new"), "base_8bit": True}
    with pytest.raises(AssertionError, match="--parallel hybrid: quantized weights cannot be sharded"):
        run_world(2, [("precompute", {**again, "parallel": "hybrid"})], tmp_path / "world")
    assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()
