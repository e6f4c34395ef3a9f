"""Asked to stop, a run ends soon, though one process sleeps or is stopped; one that saves is waited for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minicache.processes.stuck import LIMIT
from minicache.training import checkpoints

ROOT = Path(__file__).parents[2]
# Seconds in a collective, in most tests.
SHORT = 2.0
# Runs in every process before any other code: changes a module once it has been imported.
FAULT = """
import importlib.util, os, signal, sys, time

def changed(module):
    if module.__name__ == "minicache.processes.stuck":
        module.Watch.limit = property(lambda self: max(LIMIT, vars(self).get("limit", 0)),
                                      lambda self, value: vars(self).update(limit=value if value != module.LIMIT else 0))
    elif "RANK" in os.environ:
        change(module, int(os.environ["RANK"]))

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in ("minicache.processes.stuck", "minicache.training.loop", "minicache.training.snapshot"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), changed(module))
        return spec

sys.meta_path.insert(0, Finder())
"""
STEP = """
def change(module, rank):
    if module.__name__ == "minicache.training.loop":
        inner = module.take_step
        def outer(run, training, mine):
            if training.progress.step >= FIRST and rank in RANKS:
                {what}
            return inner(run, training, mine)
        module.take_step = outer
"""
SAVE = """
def change(module, rank):
    if module.__name__ == "minicache.training.snapshot":
        inner = module.save_model
        def outer(*arguments):
            time.sleep({seconds})
            inner(*arguments)
        module.save_model = outer
"""


def start(
    tmp_path: Path, ref_cache: Path, code: str, *more: object, limit: float = SHORT, lines: int = 3
) -> subprocess.Popen[str]:
    """`train --nproc 2` with this fault, once it has logged so many steps."""
    (tmp_path / "sitecustomize.py").write_text(f"LIMIT = {limit}\nFIRST = {lines}\n{code}\n{FAULT}")
    options = ["--batch-size", 8, "--log-every", 1, "--epochs", 4000, "--nproc", 2, *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "minicache", "train", "--ref-cache", str(ref_cache), "--out", str(tmp_path / "run")]
        + [str(each) for each in options],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # ignored where pytest runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not journal.exists() or len(journal.read_text().splitlines()) < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(0.5)
    return process


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def end(process: subprocess.Popen[str], kind: int, within: float) -> str:
    """What it said, after a signal; all processes are gone within these seconds."""
    ranks, started = children(process), time.monotonic()
    process.send_signal(kind)
    try:
        said = process.communicate(timeout=within)[1]
    except subprocess.TimeoutExpired:
        for each in [*ranks, process.pid]:
            os.kill(each, signal.SIGKILL)
        raise
    assert time.monotonic() - started < within
    assert process.returncode == 130 and "Traceback" not in said, said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    return " ".join(said.split())


SLEEPS, STOPS = "time.sleep(1000)", "os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.mark.parametrize(
    ("what", "kind", "limit"),
    [
        (SLEEPS, signal.SIGINT, SHORT),
        pytest.param(STOPS, signal.SIGTERM, LIMIT, marks=pytest.mark.slow),
    ],
    ids=["asleep", "stopped, with the usual limit"],
)
def test_a_run_ends_though_one_process_never_comes(
    what: str, kind: int, limit: float, ref_cache: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, ref_cache, f"RANKS = (1,)\n{STEP.format(what=what)}", limit=limit)
    said = end(process, kind, 30)
    assert "process 0 of 2 waited for others that do not come" in said


@pytest.mark.slow
def test_a_process_that_saves_is_waited_for(ref_cache: Path, tmp_path: Path) -> None:
    process = start(tmp_path, ref_cache, SAVE.format(seconds=3 * SHORT))
    said = end(process, signal.SIGINT, 60)
    assert "--resume goes on" in said and "do not come" not in said
    assert len(checkpoints.steps(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_slow_step_is_no_standstill(ref_cache: Path, tmp_path: Path) -> None:
    """Steps of one second with a limit of a half; they are asked in every fourth."""
    code = f"RANKS = (0, 1)\n{STEP.format(what='time.sleep(1)')}"
    process = start(tmp_path, ref_cache, code, "--log-every", 4, limit=0.5, lines=3)
    said = end(process, signal.SIGINT, 60)
    assert "--resume goes on" in said and "do not come" not in said


WATCHED = """
import os, signal, sys, time
from minicache.processes import stuck
stuck.AGAIN = 1.0
watch = stuck.Watch()
watch.limit = 0.5
for kind in (signal.SIGINT, signal.SIGTERM):
    signal.signal(kind, lambda *arguments: None)
watch.start("process 1 of 2")
ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
{code}
raise SystemExit(5)
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("with watch.inside():\n    ask(); time.sleep(3)", 130),
        ("with watch.inside():\n    time.sleep(2)", 5),
        ("ask(); time.sleep(2)", 5),
        ("ask()\nwith watch.saving(), watch.inside():\n    time.sleep(2)", 5),
        (
            "ask()\nwith watch.inside():\n    for _ in range(8):\n        time.sleep(0.25)\n        with watch.inside(): pass",
            5,
        ),
        ("watch.learn(1)\nwith watch.inside():\n    ask(); time.sleep(2)", 5),
        ("ask(); time.sleep(1.2); ask(); time.sleep(5)", 130),
        ("with watch.saving(), watch.inside():\n    ask(); time.sleep(1.2); ask(); time.sleep(5)", 130),
    ],
    ids=["waits", "not asked", "does not wait", "saves", "comes on", "is slow", "asked again", "saves, asked again"],
)
def test_a_watch_ends_only_who_was_asked_and_stands_in_a_collective(code: str, expected: int) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED.format(code=code)], timeout=60, stderr=subprocess.PIPE)
    assert done.returncode == expected, done.stderr
