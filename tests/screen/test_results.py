"""What the commands print at their end: numbers that hold, and none where nothing is known."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minicache.reports.held_out import held_out
from minicache.screen.console import SafeConsole
from minicache.screen.results import show_evaluate


@pytest.mark.parametrize(
    ("option", "shown"), [({}, "0.6931"), ({"sft_weight": 1.0}, "–"), ({"wpo": True}, "–"), ({"loss": "ipo"}, "–")]
)
def test_the_references_loss_is_ln_2_only_for_losses_that_begin_there(option: dict[str, Any], shown: str) -> None:
    settings = {"loss": "sigmoid", "logps": "mean", "beta": 0.1, "sft_weight": 0.0, "wpo": False, **option}
    names = ("accuracy/reference", "accuracy/policy", "rewards/accuracy", "rewards/margin", "loss", "kl")
    report = SimpleNamespace(
        metrics=dict.fromkeys(names, 0.25),
        settings=settings,
        pairs=3,
        ref_cache="cache",
        held_out=held_out(np.ones(3), np.ones(3, bool), np.zeros(3, bool)),
        words=[],
    )
    output = io.StringIO()
    console = SafeConsole(file=output, width=120)
    show_evaluate(console, report)  # type: ignore[arg-type]
    (line,) = [line for line in output.getvalue().splitlines() if line.split()[:1] == ["loss"]]
    assert line.split() == ["loss", shown, "0.2500"]
