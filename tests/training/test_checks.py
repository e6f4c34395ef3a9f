"""What depends on options and machine alone is refused before a cache or a model is read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.errors import CacheMismatch, ConfigError
from minicache.options.train import LossOptions, TrainConfig, ValidationOptions
from minicache.processes.world import World
from minicache.scoring.loading import Sources
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import one_process


class Twin(World):
    """Rank 0 of a world whose other ranks find what it finds."""

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


TWO = Twin(0, 2, torch.device("cpu"))
HELD = "--loss aot: sorts over a training batch, so it cannot judge held-out pairs"


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (TWO, {"parallel": "fsdp", "dtype": "float16"}, "--dtype float16: not with --parallel fsdp; expected bfloat16"),
        (TWO, {"parallel": "fsdp", "optimizer": "adamw-8bit"}, "--optimizer adamw-8bit: .* fsdp; expected adamw, or"),
        (
            TWO,
            {"parallel": "hybrid", "optimizer": "paged-adamw-8bit"},
            "not with --parallel hybrid; expected adamw, or",
        ),
        (TWO, {"optimizer": "adamw-cpu"}, "--optimizer adamw-cpu: not with 2 processes"),
        (
            TWO,
            {"loss": "sigmoid,aot"},
            "--loss aot: sorts over the whole batch, which 2 processes would split; use one",
        ),
        (one_process(), {"optimizer": "adamw-cpu", "dtype": "float16"}, "adamw-cpu: not with --dtype float16"),
        (one_process(), {"loss": "aot", "validation": ValidationOptions(holdout=0.5)}, HELD),
        (one_process(), {"loss": "aot", "validation": ValidationOptions(eval_cache="other")}, HELD),
        (one_process(), {"compile": True}, "--compile: expected a C"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_cache_is_opened(
    world: World, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(tmp_path / "no cache", tmp_path / "run", **options), world, Silent())


def test_a_cache_that_lacks_what_the_loss_reads_is_refused_before_its_pairs_are_read(
    ref_cache: Path, tmp_path: Path
) -> None:
    def read(*_: object) -> Any:
        raise AssertionError("read")

    config = TrainConfig(ref_cache, tmp_path / "run", loss_options=LossOptions(ld_alpha=0.5))
    with pytest.raises(CacheMismatch, match="--ld-alpha: needs each token's reference logprob"):
        train(config, one_process(), Silent(), Sources(pairs=read))
