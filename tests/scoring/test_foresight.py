"""What does not fit is refused before a model is loaded; what may fit, or is not known, is tried."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.cache.reader import ReferenceCache
from minicache.errors import FullMemory
from minicache.models import load_model
from minicache.options.lora import LoraOptions
from minicache.options.train import TrainConfig
from minicache.scoring import budget, foresight
from minicache.scoring.budget import counted
from minicache.scoring.foresight import MARGIN, Held, require_room
from minicache.scoring.masks import Windows
from minicache.scoring.memory import How, need_of
from minicache.scoring.scorer import Scorer
from minicache.stages import train as stage
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(foresight, "free_bytes", lambda device, processes: free)


def needed(ref_cache: Path) -> float:
    """The bytes of a step on the longest pair of a cache, counted on the loaded model."""
    cache = ReferenceCache(ref_cache)
    model, table = load_model(cache.log.model).model.requires_grad_(True), cache.load().table
    scorer = Scorer(model, "float32")
    scorer.use_layout("packed", Windows.read(model.config, 1))
    need = need_of(scorer, counted(scorer, table, How(training=True)), "adamw")
    return need.weights + need.state + need.passes.bytes(need.passes.slots)


def test_training_is_refused_before_the_model_is_loaded(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From both sides of the margin."""
    loaded: list[str] = []

    def load(*arguments: Any) -> Any:
        loaded.append("loaded")
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "load_policy", load)
    total = needed(ref_cache)
    with_free(monkeypatch, total / (1.01 * MARGIN))
    with pytest.raises(
        FullMemory, match=r"are free .*; got .* for its weights, .* for gradients, .* for the opt"
    ) as found:
        train(TrainConfig(ref_cache, tmp_path / "run"), one_process(), Silent())
    assert "Nothing was loaded. Try --activation-checkpointing" in str(found.value)
    assert re.search(r"for a pass over the longest pair, [\d,]+ token slots", str(found.value))
    assert not loaded and not (tmp_path / "run").exists()
    with_free(monkeypatch, total / (0.99 * MARGIN))
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(ref_cache, tmp_path / "run"), one_process(), Silent())
    assert loaded


def test_a_budget_that_is_given_is_tried_and_adapters_need_less(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 0.8 * needed(ref_cache))
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 2}
    train(TrainConfig(ref_cache, tmp_path / "given", tokens_per_micro_batch=200, **options), one_process(), Silent())
    adapters = LoraOptions(lora_rank=2)
    train(TrainConfig(ref_cache, tmp_path / "lora", lora=adapters, **options), one_process(), Silent())


def test_a_run_counts_its_pass_once(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted before the model is loaded gives the token budget after it."""
    monkeypatch.setattr(budget, "COUNTED", {})
    train(TrainConfig(ref_cache, tmp_path / "run", max_steps=1), one_process(), Silent())
    assert len(budget.COUNTED) == 1


def test_stage_one_is_refused_by_its_weights(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored in half precision and computed in float32 they are copied; as they are stored they are pages of a file."""
    half = tmp_path / "half"
    load_model(str(model_dir)).model.to(torch.bfloat16).save_pretrained(half)  # type: ignore[operator]
    for file in model_dir.iterdir():
        if not (half / file.name).exists():
            (half / file.name).write_bytes(file.read_bytes())
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(4))
    weights = 4.0 * sum(each.numel() for each in load_model(str(model_dir)).model.parameters())
    with_free(monkeypatch, weights / (1.01 * MARGIN))
    with pytest.raises(FullMemory, match=r"for its weights. Nothing was loaded. Try --base-4bit"):
        precompute_into(tmp_path / "cache", half, data, dtype="float32")
    assert not (tmp_path / "cache").exists()
    precompute_into(tmp_path / "stored", model_dir, data, dtype="float32")
    with_free(monkeypatch, weights / (0.99 * MARGIN))
    precompute_into(tmp_path / "cache", half, data, dtype="float32")


def test_what_is_not_known_is_not_refused(
    checkpoints: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 1.0)
    held = Held("float32", trained=True)
    settings = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "of another time"}))
    (file,) = checkpoints.glob("minimind3-dense.pth")
    for source in (str(file), f"{file}:heads=8", str(tmp_path), str(tmp_path / "nothing")):
        require_room(source, False, held, one_process())
    with pytest.raises(FullMemory):
        require_room(str(model_dir), False, held, one_process())
