"""A working directory that a stranger filled: modules planted there are imported by no form of the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicache import interpreter
from minicache.data.encode import Encoder
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.workers import RowEncoder, _Worker
from tests.conftest import make_rows

ROOT = Path(__file__).parents[2]
# Of this program, of the libraries, and of Python itself; `python -m` reads its own (contextlib, types) before any program runs.
PLANTED = (
    "torch",
    "json",
    "numpy",
    "typer",
    "yaml",
    "pickle",
    "logging",
    "zarr",
    "tokenizers",
    "sitecustomize",
    "random",
)
MINIDPO = "import sys; sys.argv[0] = 'minidpo'; from minicache.cli import main; main()"
# As the installed script: Python puts the script's directory first, and not the working directory.
SCRIPT = [sys.executable, "-P", "-c", MINIDPO]
MODULE = [sys.executable, "-m", "minicache"]
SAFE_MODULE = [sys.executable, "-P", "-m", "minicache"]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "-m", "minicache"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory of modules each of which leaves a file `ran-NAME` when it is imported."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in (*PLANTED, "minicache"):
        plant(folder, name)
    return folder


def plant(folder: Path, name: str) -> None:
    ran = folder.parent / f"ran-{name}"
    (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit(7)\n")


def started(command: list[str], where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a working directory. This package is found as an installed one is: by a path that is not relative."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    given.pop("PYTHONSAFEPATH", None) if "PYTHONSAFEPATH" not in variables else None
    return subprocess.run(command, cwd=where, env=given, capture_output=True, text=True, timeout=180)


def ran(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.parent.glob("ran-*"))


def test_what_is_planted_would_run(theirs: Path) -> None:
    """Else the tests below would show nothing."""
    assert started([sys.executable, "-c", "import torch"], theirs).returncode == 7
    assert ran(theirs) == ["ran-torch"]


@pytest.mark.parametrize(("form", "more"), [(SCRIPT, {}), (SAFE_MODULE, {}), (MODULE, {"PYTHONSAFEPATH": "1"})])
def test_the_command_imports_nothing_from_there(
    theirs: Path, ref_cache: Path, form: list[str], more: dict[str, str]
) -> None:
    done = started([*form, "inspect-cache", str(ref_cache)], theirs, **more)
    assert (done.returncode, ran(theirs)) == (0, []), done.stderr


def test_as_a_module_only_what_python_reads_before_the_program_is(theirs: Path, ref_cache: Path) -> None:
    """`python -m` without -P looks there for the program itself, which no program can change."""
    (theirs / "minicache.py").unlink()
    done = started([*MODULE, "inspect-cache", str(ref_cache)], theirs)
    assert (done.returncode, ran(theirs)) == (0, []), done.stderr


@pytest.mark.parametrize("form", [SCRIPT, pytest.param(SAFE_MODULE, marks=pytest.mark.slow)])
def test_processes_of_nproc_import_nothing_from_there(theirs: Path, ref_cache: Path, form: list[str]) -> None:
    options = ["--max-steps", "2", "--batch-size", "8", "--device", "cpu"]
    arguments = ["train", "--ref-cache", str(ref_cache), "--out", str(theirs.parent / "run"), *options]
    done = started([*form, *arguments, "--nproc", "2"], theirs)
    assert (done.returncode, ran(theirs)) == (0, []), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("safe", ["1", ""], ids=["as the documentation says", "without the variable"])
def test_processes_of_torchrun_import_nothing_from_there(theirs: Path, ref_cache: Path, safe: str) -> None:
    if not safe:
        (theirs / "minicache.py").unlink()
    arguments = ["train", "--ref-cache", str(ref_cache), "--out", str(theirs.parent / "run"), "--max-steps", "2"]
    done = started([*TORCHRUN, *arguments, "--device", "cpu"], theirs, **({"PYTHONSAFEPATH": safe} if safe else {}))
    assert (done.returncode, ran(theirs)) == (0, []), done.stderr


def test_processes_that_encode_import_nothing_from_there(
    theirs: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minicache.data.columns import Reading

    monkeypatch.chdir(theirs)
    worker = _Worker(RowEncoder(Encoder(ChatTokenizer.load(tokenizer_dir), 40), "pairs.jsonl", Reading(), 0))
    try:
        assert len(worker.ask(list(enumerate(make_rows(3), start=1)))) == 3
    finally:
        worker.process.kill()
        worker.process.wait()
        worker.close()
    assert ran(theirs) == []


def test_python_below_the_command_does_not_look_there(theirs: Path) -> None:
    """Of libraries that start Python: compilers, trackers."""
    lines = ["import sys, subprocess", "from minicache.cli import main", "sys.argv[1:] = ['--version']"]
    lines += ["try: main()", "except SystemExit: pass"]
    lines += ["sys.exit(subprocess.call([sys.executable, '-c', 'import json, sys; sys.exit(3)']))"]
    code = "\n".join(lines)
    assert started([sys.executable, "-P", "-c", code], theirs).returncode == 3
    assert ran(theirs) == []


def test_a_copy_that_is_not_installed_still_starts_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`python -m minicache` in a copy of the repository: the package is found there, and by the processes that it starts."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # so that it is taken back
    monkeypatch.chdir(ROOT)
    assert interpreter.python_environment()["PYTHONPATH"] == str(ROOT)
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *before])
    interpreter.forget_working_directory()
    assert sys.path == [str(ROOT), *before]
    monkeypatch.chdir(tmp_path)
    assert "PYTHONPATH" not in interpreter.python_environment()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *before])
    interpreter.forget_working_directory()
    assert sys.path == before


def test_a_removed_working_directory_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    interpreter.forget_working_directory()
    assert interpreter.python_environment()["PYTHONSAFEPATH"] == "1"


def test_a_removed_working_directory_keeps_no_command_from_absolute_paths(ref_cache: Path, tmp_path: Path) -> None:
    """And a relative path is named as what it is: not there."""
    gone = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'

    def there(*words: object) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", gone, str(tmp_path / "gone"), *SCRIPT, *map(str, words)]
        return started(command, tmp_path)

    done = there("inspect-cache", ref_cache, "--html", tmp_path / "page.html")
    assert done.returncode == 0 and (tmp_path / "page.html").is_file(), done.stderr
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 0.5}\n{"step": 1, "loss": 0.4}\n', encoding="utf-8")
    done = there("report", run)
    assert done.returncode == 0, done.stderr
    done = there("inspect-cache", "relative/cache")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
