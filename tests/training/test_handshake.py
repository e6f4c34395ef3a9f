"""Tolerances of the handshake, from both sides: a difference just within each is noise, one just beyond it another model."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minicache.cache.identity import TOLERANCE
from minicache.cache.reader import ReferenceCache
from minicache.errors import HandshakeError
from minicache.models import load_model
from minicache.scoring.scorer import Scorer
from minicache.trackers import Silent
from minicache.training import checks
from minicache.training.checks import handshake
from tests.conftest import one_process

EXPECTED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # nats per token


def run_of(cache: Path, model: Path, dtype: str, shift: float) -> Any:
    """What the handshake sees of a run: a cache of this precision, one of whose pairs is off by `shift`."""
    cached = ReferenceCache(cache).load()
    means = cached.reference.logp_mean.astype(np.float64)
    means[0, 1] += shift
    return SimpleNamespace(
        config=SimpleNamespace(init_from=None),
        world=one_process(),
        scorer=Scorer(load_model(str(model)).model, "float32", "padded"),
        cached=cached._replace(reference=replace(cached.reference, logp_mean=means)),
        cache=SimpleNamespace(identity=SimpleNamespace(dtype=dtype)),
    )


def test_the_precisions_are_those_tested_here() -> None:
    assert TOLERANCE.keys() == EXPECTED.keys()


@pytest.mark.parametrize("dtype", EXPECTED)
@pytest.mark.parametrize("sign", [1, -1])
def test_just_within_passes_and_just_beyond_fails(ref_cache: Path, model_dir: Path, dtype: str, sign: int) -> None:
    within, beyond = (sign * EXPECTED[dtype] * share for share in (0.95, 1.05))
    worst = handshake(run_of(ref_cache, model_dir, dtype, within), Silent())
    assert worst == pytest.approx(abs(within), rel=0.04)
    with pytest.raises(HandshakeError, match=r"1 of 8 pairs re-scored differ by more than .* \(pair 0 by"):
        handshake(run_of(ref_cache, model_dir, dtype, beyond), Silent())


@pytest.mark.parametrize("stored", EXPECTED)
@pytest.mark.parametrize("used", EXPECTED)
def test_the_wider_of_two_precisions_counts(
    ref_cache: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, stored: str, used: str
) -> None:
    asked: list[float] = []

    def reproduces(*arguments: Any) -> float:
        asked.append(arguments[3])
        return 0.0

    monkeypatch.setattr(checks, "check_reproduces", reproduces)
    run = run_of(ref_cache, model_dir, stored, 0.0)
    run.scorer = SimpleNamespace(dtype=used, lockstep=None)
    handshake(run, Silent())
    assert asked == [max(EXPECTED[stored], EXPECTED[used])]
