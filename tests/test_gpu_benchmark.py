"""benchmarks/gpu on a CPU with tiny shapes: its checks run, and what fails, dies or takes too long does not stop the others."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import visit as visits
from benchmarks.gpu.catalog import CHECKS, Check
from benchmarks.gpu.figures import Figure, Machine, NeedsGpu, at_least, at_most, attempt, exactly, within
from benchmarks.gpu.page import page, report_of, section
from benchmarks.gpu.visit import CUT_OFF, FAILED, MISSED, NO_GPU, NOT_RUN, OK, Outcome, visit

ROOT = Path(__file__).parents[1]
FACTS = {"date": "2026-01-01", "command": "python -m benchmarks.gpu", "tiny": True}


# --- checks, which run in the process of a visit ---


def good(machine: Machine) -> Iterator[Figure]:
    yield at_most("good", 1.0, 2.0, "s")
    yield Figure("process", float(os.getpid()))


def missing(machine: Machine) -> Iterator[Figure]:
    yield at_most("missed", math.nan, 2.0)
    yield at_least("holds", 3.0, 2.0)


def raising(machine: Machine) -> Iterator[Figure]:
    yield Figure("before", 1.0)
    raise RuntimeError("no kernel\nfor this")


def partly(machine: Machine) -> Iterator[Figure]:
    def part() -> Iterator[Figure]:
        yield Figure("first", 1.0)
        raise RuntimeError("half of it")

    yield from attempt("second", part)
    yield Figure("third", 1.0)


def dying(machine: Machine) -> Iterator[Figure]:
    yield Figure("before", 1.0)
    os._exit(7)


def stuck(machine: Machine) -> Iterator[Figure]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Figure("child", float(child.pid))
    time.sleep(600)


def on_a_gpu(machine: Machine) -> Iterator[Figure]:
    yield Figure("before", 1.0)
    raise NeedsGpu("the rest needs a GPU")


def checks(**seconds: float) -> dict[str, Check]:
    return {name: Check(f"{__name__}:{name}", name, limit) for name, limit in seconds.items()}


@pytest.fixture(autouse=True)
def limits_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "PATIENCE", 1)


def test_a_check_that_raises_or_dies_does_not_stop_the_others() -> None:
    heard: list[list[str]] = []
    asked = checks(good=60, raising=60, missing=60, dying=60, on_a_gpu=60, partly=60)
    found = visit(asked | {"again": asked["good"]}, True, 10, lambda each: heard.append([one.name for one in each]))
    assert [each.status for each in found] == [OK, FAILED, MISSED, FAILED, NO_GPU, FAILED, OK]
    assert found[1].message == "RuntimeError: no kernel for this"
    assert found[3].message == "its process ended with 7"
    assert [each.figures[0].name for each in found[1:5]] == ["before", "missed", "before", "before"]
    assert [(each.name, each.error) for each in found[5].figures] == [
        ("first", ""),
        ("second", "half of it"),
        ("third", ""),
    ]
    # what was found so far is heard after every check
    names = [each.name for each in found]
    assert heard == [names[: count + 1] for count in range(len(names))]
    # a process that failed is replaced
    assert found[0].figures[1].value != found[-1].figures[1].value


def test_a_stuck_check_is_cut_off_with_what_it_started() -> None:
    found = visit(checks(stuck=8, good=60), True, 10, lambda each: None)
    assert [each.status for each in found] == [CUT_OFF, OK]
    (child,) = found[0].figures
    assert isinstance(child.value, float)
    deadline = time.monotonic() + 10
    while _is_alive(int(child.value)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(int(child.value))


def _is_alive(process: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_checks_that_no_longer_fit_are_listed_and_not_run() -> None:
    found = visit(checks(stuck=15, good=60), True, 0.12, lambda each: None)
    assert [each.status for each in found] == [CUT_OFF, NOT_RUN]
    assert "no time" in found[1].message and found[0].seconds < 12


def test_a_figure_holds_up_to_its_bound() -> None:
    assert at_most("", 2.0, 2.0).holds and not at_most("", 2.01, 2.0).holds
    assert at_least("", 2.0, 2.0).holds and not at_least("", 1.99, 2.0).holds
    assert within("", 0.91, 0.1).holds and within("", 1.09, 0.1).holds
    assert not within("", 0.89, 0.1).holds and not within("", 1.11, 0.1).holds
    assert exactly("", False, False).holds and not exactly("", True, False).holds


def test_page_and_json_say_what_was_found() -> None:
    figures = [
        at_most("a|b", math.inf, 1.0, "s"),
        Figure("x", 12345.6, "a second"),
        Figure("y", None, error="no\nkernel"),
    ]
    report = report_of([Outcome("speed 64M", FAILED, "why", figures, 3.2), Outcome("later", NOT_RUN, "no time")], FACTS)
    # JSON has no infinity
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = page(report)
    assert "\n".join(section(report)) in text
    assert "| speed 64M | a\\|b | inf s | at most 1 | MISSED |" in text
    assert "| x | 12,346 a second |" in text and "| y | no kernel |  | FAILED |" in text
    assert "| later |  | not run | no time | 0 |" in text


# --- the checks themselves ---


LONG = [name for name in CHECKS if name in ("fit", "attention", "compile", "layouts") or name.startswith("speed")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in CHECKS if name != "commands"],
)
def test_a_check_runs_on_a_cpu(name: str) -> None:
    from importlib import import_module

    module, _, function = CHECKS[name].code.partition(":")
    found = []
    try:
        for figure in getattr(import_module(module), function)(Machine(tiny=True)):
            found.append(figure)
    except NeedsGpu as needed:
        assert "needs a GPU" in str(needed)
    assert [each for each in found if each.error] == []
    # values do not depend on what else the machine does, as speeds do
    assert name.startswith("speed") or [each for each in found if each.holds is False] == []
    assert found or name in ("waits", "graphs")


def test_useful_flops_are_those_of_the_definition() -> None:
    from benchmarks.flops import useful_flops
    from benchmarks.gpu.material import Size, make_model, table_of

    machine = Machine(tiny=True)
    hidden, layers, heads, kv, wide, vocabulary, width = 64, 2, 4, 2, 96, 600, 16
    model = make_model(machine, Size((hidden, layers, heads, kv, wide, vocabulary)), "float32")
    prefix, chosen, rejected = 5, 3, 2
    table = table_of(np.array([[prefix, chosen, rejected]] * 2), vocabulary, np.random.default_rng(0))
    body = layers * (2 * hidden * heads * width + 2 * hidden * kv * width + 3 * hidden * wide)
    # the queries of each part see the prefix, and themselves causally
    seen = 15 + (3 * 5 + 6) + (2 * 5 + 3)
    forward = 2 * body * 10 + 2 * hidden * vocabulary * 5 + 4 * heads * width * layers * seen
    one = np.array([1])
    assert useful_flops(model, table, one, training=False) == forward
    assert useful_flops(model, table, one, training=True) == 3 * forward
    model.requires_grad_(False)
    half = 2 * (2 * body * 10 + 2 * hidden * vocabulary * 5) + 3 * 4 * heads * width * layers * seen
    assert useful_flops(model, table, one, training=True) == half


# two visits' worth of processes of their own
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_command_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["name"] for each in report["checks"]] == list(CHECKS)
    for each in report["checks"]:
        assert each["status"] in (OK, MISSED, NO_GPU), each
        assert each["status"] != NO_GPU or "needs a GPU" in each["message"]
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in text for name in CHECKS)
