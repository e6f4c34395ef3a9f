"""--weights bfloat16: weights, gradients and state in 6 bytes a weight, which learn what float32 ones do."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import precompute_into
from tests.training.test_resume import assert_same_run, killed_at, run

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16
OURS: dict[str, Any] = {"weights": "bfloat16", "dtype": "bfloat16"}

needs_torchao = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("torchao") is None, reason="needs torchao"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_file: Path) -> Path:
    return precompute_into(tmp_path_factory.mktemp("half") / "cache", model_dir, data_file, dtype="bfloat16")


@needs_torchao
@pytest.mark.parametrize("options", [{}, {"async_save": True}], ids=["", "async"])
def test_a_killed_run_resumes_bit_for_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    run(cache, tmp_path / "whole", **OURS)
    killed_at(monkeypatch, 41, cache, tmp_path / "killed", **OURS, **options)
    run(cache, tmp_path / "killed", resume=True, **OURS, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
