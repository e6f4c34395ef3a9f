"""run.json: read as what it is, whoever wrote it and when; and one process at a time in a run's directory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicache.errors import ConfigError, MinicacheError, OutputError, RunBusy
from minicache.options.train import MOVABLE, TrainConfig
from minicache.training.lock import RunLock
from minicache.training.resuming import find_begun
from minicache.training.run_directory import (
    DEFAULTS,
    LATER,
    RECORD,
    RunRecord,
    is_unused,
    read_record,
    run_facts,
    write_record,
)
from tests.conftest import Cli
from tests.training.test_resume import SETTINGS, assert_same_run, killed_at, run

GOLDEN = Path(__file__).parent / "golden" / "run-0.1.0.json"


def record_in(directory: Path, facts: dict[str, Any]) -> RunRecord | None:
    (directory / RECORD).write_text(json.dumps(facts))
    return read_record(directory)


# --- the record ---


def test_a_run_of_0_1_0_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    facts = json.loads(GOLDEN.read_text())
    record = record_in(tmp_path, facts)
    assert record and record.outcome and record.outcome.progress.step == record.steps == 5
    assert record.flat == facts and list(record.flat) == list(facts)
    write_record(tmp_path, record)
    assert (tmp_path / RECORD).read_text() == GOLDEN.read_text()


def test_what_a_later_version_adds_is_passed_over_and_kept(tmp_path: Path) -> None:
    facts = json.loads(GOLDEN.read_text()) | {"warp": {"factor": 9}}
    facts["outcome"]["mood"] = facts["outcome"]["progress"]["mood"] = "good"
    record = record_in(tmp_path, facts)
    assert record and record.flat["warp"] == {"factor": 9} and record.outcome


def test_what_an_older_version_did_not_have_is_the_options_default(tmp_path: Path) -> None:
    facts = json.loads(GOLDEN.read_text())
    for name in DEFAULTS:
        facts.pop(name, None)
    record = record_in(tmp_path, facts)
    assert record and {name: record.options[name] for name in DEFAULTS} == DEFAULTS


WRONG = {"handshake": "0", "steps": -1, "pairs": 1.5, "device": None, "outcome": [], "failed": 3, "beta": "much"}


@pytest.mark.parametrize("name", WRONG)
def test_an_entry_of_another_kind_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    facts = json.loads(GOLDEN.read_text()) | {name: WRONG[name]}
    with pytest.raises(OutputError, match=rf"run.json: .*{name}.*expected") as error:
        record_in(tmp_path, facts)
    assert "\n" not in str(error.value)
    if name != "beta":
        with pytest.raises(OutputError, match=f"run.json: {name}: expected"):
            run_facts(tmp_path)


@pytest.mark.parametrize("name", ["started_from", "handshake", "steps", "token_budget"])
def test_a_record_without_what_train_found_is_refused(tmp_path: Path, name: str) -> None:
    facts = json.loads(GOLDEN.read_text())
    del facts[name]
    with pytest.raises(OutputError, match=f"not as `train` writes it .*{name}.*; its model is in"):
        record_in(tmp_path, facts)
    assert name not in run_facts(tmp_path)


def test_an_older_run_is_resumed_although_options_are_new_since(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run(ref_cache, tmp_path / "whole")
    killed_at(monkeypatch, 41, ref_cache, out)
    facts = json.loads((out / RECORD).read_text())
    old = {name: value for name, value in facts.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    assert {"beta_end", "ld_alpha", "max_kl"} <= facts.keys() - old.keys() and len(facts) - len(old) > 30
    (out / RECORD).write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=r"--beta-end: this run was started with None, asked for 0\.5"):
        run(ref_cache, out, resume=True, beta_end=0.5)
    run(ref_cache, out, resume=True)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - MOVABLE - SETTINGS.keys() - {"dtype"}))
def test_an_option_that_run_json_lacks_is_no_other_option(
    ref_cache: Path, tmp_path: Path, stopped: Path, name: str
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    facts = json.loads((out / RECORD).read_text())
    assert (name in facts) == (name not in LATER)
    facts.pop(name, None)
    (out / RECORD).write_text(json.dumps(facts))
    begun = find_begun(TrainConfig(ref_cache, out, resume=True, dtype="float32", **SETTINGS))
    assert begun and begun.step and begun.record.options[name] == DEFAULTS[name]


def test_an_option_that_a_run_of_0_1_0_kept_and_never_read_may_be_left_out(
    ref_cache: Path, tmp_path: Path, stopped: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    facts = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps({**facts, "simpo_gamma": 1.0}))
    assert find_begun(TrainConfig(ref_cache, out, resume=True, dtype="float32", **SETTINGS))
    (out / RECORD).write_text(json.dumps({**facts, "label_smoothing": 0.2}))
    with pytest.raises(ConfigError, match=r"--label-smoothing: this run was started with 0\.2"):
        find_begun(TrainConfig(ref_cache, out, resume=True, dtype="float32", **SETTINGS))


@pytest.fixture(scope="module")
def stopped(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 41, ref_cache, out)
    return out


# --- one process at a time ---

HOLD = (
    "import sys; from pathlib import Path; from minicache.training.lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); print(lock.take(), flush=True); sys.stdin.read()"
)


@pytest.fixture
def hold() -> Any:
    """Start a process that holds a run directory until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(out)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout and process.stdout.readline() == "True\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_on_a_living_run_is_refused(
    stopped: Path, ref_cache: Path, tmp_path: Path, cli: Cli, hold: Callable[[Path], subprocess.Popen[str]]
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    first = hold(out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, _, stderr = cli("train", "--out", out, "--resume")
    assert code == 1 and f"error: {out}: another process is at work on this run; wait until" in stderr
    # known before anything else is looked at
    code, _, stderr = cli("train", "--out", out, "--resume", "--ref-cache", tmp_path / "gone")
    assert code == 1 and "another process is at work" in stderr
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    first.kill()
    first.wait()
    run(ref_cache, out, resume=True)  # what it left behind is no lock
    assert not (out / ".lock").exists() and (out / "model").is_dir()


def test_two_that_begin_a_run_at_once(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one makes the directory after this one has looked, and before it writes there."""
    from minicache.stages import train as stage

    out, other = tmp_path / "run", RunLock(tmp_path / "run")

    def meanwhile(*arguments: Any) -> float:
        out.mkdir()
        assert other.take() and other.is_held
        return 0.0

    monkeypatch.setattr(stage, "handshake", meanwhile)
    with other, pytest.raises(RunBusy, match="another process is at work"):
        run(ref_cache, out)
    assert not (out / RECORD).exists() and not list(out.iterdir())


def test_a_lock_is_no_run(ref_cache: Path, tmp_path: Path, hold: Callable[[Path], subprocess.Popen[str]]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    killed = hold(out)
    killed.kill()
    killed.wait()
    assert (out / ".lock").exists() and is_unused(out)
    run(ref_cache, out, epochs=1)
    assert (out / "model").is_dir() and not (out / ".lock").exists()


def test_what_is_no_run_is_left_alone(ref_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "papers"
    out.mkdir()
    (out / "thesis").touch()
    with pytest.raises(MinicacheError, match="is no run"):
        run(ref_cache, out)
    assert [file.name for file in out.iterdir()] == ["thesis"]
