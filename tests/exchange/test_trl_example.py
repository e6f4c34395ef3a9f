"""TRL trains from an exported cache, and its curve is ours. Needs TRL: pip install '.[bench]'."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.options.exchange import ExportCacheConfig
from minicache.options.train import TrainConfig
from minicache.stages.export_cache import export_cache
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import TEMPLATE, one_process, precompute_into

pytest.importorskip("trl", reason="needs TRL: pip install '.[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's and datasets' own

STEPS, LR = 4, 1e-3


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))  # where datasets keeps what it reads
        warnings.simplefilter("ignore")
        from examples import trl_from_cache

        yield trl_from_cache


def trainer_for(example: Any, cache: Path, model: Path, home: Path) -> Any:
    export_cache(ExportCacheConfig(cache, home / "pairs.parquet"), Silent())
    return example.trainer_for(
        str(model),
        str(home / "pairs.parquet"),
        str(home / "theirs"),
        per_device_train_batch_size=40,
        max_steps=STEPS,
        learning_rate=LR,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
    )


def test_trl_s_curve_is_ours(example: Any, ref_cache: Path, model_dir: Path, tmp_path: Path) -> None:
    """Every step takes all 40 pairs, so their order does not matter and the whole curve can be compared."""
    trainer = trainer_for(example, ref_cache, model_dir, tmp_path)
    assert trainer.ref_model is None
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "batch_size": 40,
        "lr": LR,
        "schedule": "linear",
        "warmup": 0,
        "log_every": 1,
    }
    train(TrainConfig(ref_cache, tmp_path / "ours", logps="sum", **options), one_process(), Silent())
    ours = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    assert theirs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    reference = ReferenceCache(ref_cache).load().reference
    sums = (reference.logp_mean.astype(np.float64) * reference.token_count).mean(0)
    for side, name in enumerate(("logps/chosen", "logps/rejected")):
        assert theirs[0][name] == pytest.approx(sums[side], abs=1e-4)
    assert [line["loss"] for line in ours[:STEPS]] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    assert theirs[-1]["loss"] < 0.5


@pytest.mark.parametrize("ends_in_eos", [True, False])
def test_when_trl_makes_the_same_ids_of_the_text(
    example: Any, model_dir: Path, data_file: Path, tmp_path: Path, ends_in_eos: bool
) -> None:
    """It adds the end-of-sequence token to an answer that does not end in it, as after ChatML's last newline."""
    from trl import DPOTrainer

    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE.replace("<|im_end|>\n", "<|im_end|>") if ends_in_eos else TEMPLATE)
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, chat_template=template)
    trainer = trainer_for(example, cache, model_dir, tmp_path)
    data = example.load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train")
    tokenizer = trainer.processing_class
    again = DPOTrainer._prepare_dataset(trainer, data, tokenizer, trainer.args, "train")
    added = [] if ends_in_eos else [tokenizer.eos_token_id]
    assert again["prompt_ids"] == data["prompt_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        assert list(again[side]) == [ids + added for ids in data[side]]


def test_pairs_that_trl_would_sum_otherwise_are_refused(
    example: Any, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, loss_on="assistant")
    with pytest.raises(ValueError, match="exactly the answers count"):
        trainer_for(example, cache, model_dir, tmp_path)
