"""Other users of the machine, and other calls at the same place at the same moment, for real."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import FORKS, Job, job, run_here
from tests.stages.test_precompute import small_disk
from tests.torture.test_run import flags, whole
from tests.training.test_resume import assert_same_run

__all__ = ["job", "small_disk", "whole"]  # fixtures
SOMEBODY = 12345  # a user that is not there
# CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER of include/uapi/linux/capability.h: what root may do with others' files
RIGHTS = (1 << 1) | (1 << 2) | (1 << 3)
VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
Said = tuple[int | None, str]


def give_up_rights() -> bool:
    """Whether this process is from now on, to files of others, a user like any other."""
    if os.geteuid():
        return True
    header, sets = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capget(header, sets):
        return False
    for effective_or_permitted in (0, 1):
        sets[effective_or_permitted] &= ~RIGHTS
    return bool(ctypes.CDLL(None).capset(header, sets) == 0)


def run_as_another(arguments: list[str], output: Path, variables: dict[str, str]) -> None:
    os.umask(0o022)
    if not give_up_rights():
        raise SystemExit("the rights of root could not be given up")
    os.environ.update(variables)
    run_here(arguments, output)


def started(output: Path, *arguments: object, **variables: str) -> FORKS.Process:  # type: ignore[name-defined]
    process = FORKS.Process(target=run_as_another, args=([str(each) for each in arguments], output, variables))
    process.start()
    return process


def ended(process: FORKS.Process, output: Path) -> Said:  # type: ignore[name-defined]
    process.join(120)
    said = " ".join(output.read_text().split()).replace("\x1b", "")
    assert "Traceback" not in said, said
    assert process.exitcode in (0, 1) and said.count("error: ") == process.exitcode, (process.exitcode, said)
    return process.exitcode, said


@pytest.fixture(scope="session")
def other_cache(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Of the same model and other pairs."""
    place = tmp_path_factory.mktemp("other")
    return precompute_into(place / "cache", model_dir, write_jsonl(place / "pairs.jsonl", make_rows(20, seed=5)))


@pytest.fixture
def theirs(ref_cache: Path, model_dir: Path, data_file: Path, whole: Path, tmp_path: Path) -> Iterator[Path]:
    """A directory of another user, with a model, data, a cache and a run in it, that all may read."""
    if not sys.platform.startswith("linux") or os.geteuid():
        pytest.skip("needs root on Linux, to give files to another user")
    place = tmp_path / "theirs"
    for name, source in (("model", model_dir), ("cache", ref_cache), ("run", whole)):
        shutil.copytree(source, place / name)
    shutil.copy(data_file, place / "data.jsonl")
    # pytest's folders and safetensors' files are their owner's alone; a run of this program is not, which is tested
    for shared in [place / "model" / "model.safetensors", *(place / name for name in ("model", "cache", "run"))]:
        shared.chmod(0o755)
    given_to(SOMEBODY, place)
    yield place
    given_to(os.getuid(), place)


def given_to(user: int, place: Path) -> None:
    subprocess.run(["chown", "-R", str(user), place], check=True)


def contents(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def said_of(theirs: Path, tmp_path: Path, *arguments: object) -> Said:
    output = tmp_path / "output"
    return ended(started(output, *arguments, TMPDIR=str(tmp_path)), output)


def test_what_another_user_made_is_read(theirs: Path, other_cache: Path, tmp_path: Path) -> None:
    cache, run, mine = theirs / "cache", theirs / "run", tmp_path / "mine"
    before = contents(theirs)
    for arguments in (
        ["inspect-cache", cache, "--verify"],
        ["train", "--ref-cache", cache, "--out", mine / "run", "--max-steps", 2],
        ["evaluate", "--policy", run, "--ref-cache", cache],
        ["precompute-ref", "--model", theirs / "model", "--data", theirs / "data.jsonl", "--ref-cache", mine / "cache"],
        ["merge", cache, other_cache, "--ref-cache", mine / "merged"],
        ["export", "--policy", run, "--out", mine / "policy"],
        ["export", "--ref-cache", cache, "--out", mine / "table.parquet"],
        ["report", run, "--out", mine / "page.html"],
        ["plot", run, "--out", mine / "plot.svg"],
    ):
        code, said = said_of(theirs, tmp_path, *arguments)
        assert code == 0, said
    assert contents(theirs) == before


def test_what_belongs_to_another_user_is_not_written_and_named(theirs: Path, other_cache: Path, tmp_path: Path) -> None:
    cache, run = theirs / "cache", theirs / "run"
    before = contents(theirs)
    stage_one = ["precompute-ref", "--model", theirs / "model", "--data", theirs / "data.jsonl", "--ref-cache"]
    for arguments in (
        [*stage_one, cache, "--per-token"],
        [*stage_one, theirs / "new"],
        ["train", "--ref-cache", cache, "--out", theirs / "other"],
        ["train", "--out", run, "--resume", "--epochs", 9],
        ["sweep", "--ref-cache", cache, "--out", theirs / "sweep", "--beta", "1,2", "--holdout", 0.1],
        ["merge", cache, other_cache, "--ref-cache", theirs / "merged"],
        ["export", "--policy", run, "--out", theirs / "policy"],
        ["export", "--ref-cache", cache, "--out", theirs / "table.jsonl"],
        ["report", run, "--out", theirs / "page.html"],
        ["plot", run, "--out", theirs / "plot.svg"],
    ):
        code, said = said_of(theirs, tmp_path, *arguments)
        assert code == 1 and str(theirs) in said, (arguments, said)
    assert contents(theirs) == before


@pytest.mark.parametrize(
    "hidden", ["cache", "cache/zarr.json", "cache/pairs", "run/run.json", "run/model", "data.jsonl"]
)
def test_what_another_user_hides_is_named(theirs: Path, other_cache: Path, tmp_path: Path, hidden: str) -> None:
    """Whether it is needed or not: a result, or one line with its place."""
    (theirs / hidden).chmod(0)
    cache, run, refused = theirs / "cache", theirs / "run", 0
    calls: list[list[object]] = [
        ["inspect-cache", cache, "--verify"],
        ["precompute-ref", "--model", theirs / "model", "--data", theirs / "data.jsonl", "--ref-cache", tmp_path / "c"],
        ["train", "--ref-cache", cache, "--out", tmp_path / "run", "--max-steps", 1],
        ["evaluate", "--policy", run, "--ref-cache", cache],
        ["merge", cache, other_cache, "--ref-cache", tmp_path / "merged"],
        ["export", "--policy", run, "--out", tmp_path / "policy"],
        ["export", "--ref-cache", cache, "--out", tmp_path / "table.jsonl"],
        ["report", run, "--out", tmp_path / "page.html"],
        ["plot", run, "--out", tmp_path / "plot.svg"],
    ]
    for call in calls:
        code, said = said_of(theirs, tmp_path, *call)
        assert code == 0 or (str(theirs) in said and "ermission denied" in said), (call[0], said)
        refused += code == 1
    assert refused
    (theirs / hidden).chmod(0o755)


def test_leftovers_of_another_user_hinder_nobody(theirs: Path, other_cache: Path, tmp_path: Path) -> None:
    """Drafts of killed calls in a directory that all may write to and where each removes only its own, as /tmp."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    for name in ("minidpo-state", "cache", "run", "minidpo-tokenizer"):
        left = shared / f".{name}.00000000-{2**31 - 1}-00000000-00000000.draft"
        (left / "inner").mkdir(parents=True)
        os.utime(left, (0, 0))
        given_to(SOMEBODY, left)
    output, cache, run = tmp_path / "output", shared / "cache", shared / "run"
    model, data = theirs / "model", theirs / "data.jsonl"
    for arguments in (
        ["precompute-ref", "--model", model, "--data", data, "--ref-cache", cache],
        ["train", "--ref-cache", cache, "--out", run, "--max-steps", 2],
        ["merge", theirs / "cache", other_cache, "--ref-cache", shared / "merged"],
    ):
        code, said = ended(started(output, *arguments, TMPDIR=str(shared)), output)
        assert code == 0, said


# --- at the same moment ---


def test_several_trains_in_one_directory(ref_cache: Path, whole: Path, tmp_path: Path) -> None:
    """One trains; the others are told so, or what it made."""
    run = tmp_path / "run"
    outputs = [tmp_path / f"output-{number}" for number in range(3)]
    processes = [started(output, "train", *flags(ref_cache, run)) for output in outputs]
    found = [ended(process, output) for process, output in zip(processes, outputs, strict=True)]
    assert sorted(code for code, _ in found if code is not None) == [0, 1, 1], found
    assert all("another process" in said or "holds a run" in said for code, said in found if code), found
    assert_same_run(run, whole)


def test_several_sweeps_in_one_directory(ref_cache: Path, tmp_path: Path) -> None:
    options = ["--beta", "0.1,1", "--max-steps", "4", "--holdout", "0.2", "--batch-size", "8"]
    outputs = [tmp_path / f"output-{number}" for number in range(2)]
    call = ["sweep", "--ref-cache", ref_cache, *options, "--out"]
    processes = [started(output, *call, tmp_path / "sweep") for output in outputs]
    found = [ended(process, output) for process, output in zip(processes, outputs, strict=True)]
    assert 0 in [code for code, _ in found], found
    assert all("another process" in said for code, said in found if code), found
    assert ended(started(outputs[0], *call, tmp_path / "sweep"), outputs[0])[0] == 0
    assert ended(started(outputs[0], *call, tmp_path / "alone"), outputs[0])[0] == 0
    for each in sorted((tmp_path / "alone").iterdir()):
        if (each / "run.json").exists():
            assert_same_run(tmp_path / "sweep" / each.name, each)


@pytest.mark.parametrize("command", ["export", "merge", "report"])
def test_several_of_what_makes_a_thing(
    ref_cache: Path, other_cache: Path, whole: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "made"
    calls: dict[str, list[object]] = {
        "export": ["export", "--policy", whole, "--out", out],
        "merge": ["merge", ref_cache, other_cache, "--ref-cache", out],
        "report": ["report", whole, "--out", out],
    }
    outputs = [tmp_path / f"output-{number}" for number in range(3)]
    processes = [started(output, *calls[command]) for output in outputs]
    found = [ended(process, output) for process, output in zip(processes, outputs, strict=True)]
    assert 0 in [code for code, _ in found], found
    told = ("another process", "exists already", "holds a reference cache")
    assert all(any(words in said for words in told) for code, said in found if code), found
    assert sorted(each.name for each in tmp_path.iterdir()) == ["made", *(output.name for output in outputs)]


# --- the directory of temporary files ---


@pytest.mark.parametrize("state", ["full", "read-only", "missing"])
def test_a_directory_of_temporary_files_that_is_of_no_use(
    small_disk: Path, job: Job, ref_cache: Path, other_cache: Path, whole: Path, tmp_path: Path, state: str
) -> None:
    """What needs none works; what does says one line, and leaves nothing."""
    place = small_disk / "temporary"
    if state != "missing":
        place.mkdir()
    if state == "full":
        with (small_disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
    if state == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = sorted(small_disk.rglob("*"))
    output = tmp_path / "output"
    calls: list[list[object]] = [
        [*job.arguments, "--ref-cache", tmp_path / "cache"],
        ["train", *flags(ref_cache, tmp_path / "run")],
        ["export", "--policy", whole, "--out", tmp_path / "policy"],
        ["merge", ref_cache, other_cache, "--ref-cache", tmp_path / "merged"],
        ["report", whole, "--out", tmp_path / "page.html"],
    ]
    for call in calls:
        code, said = ended(started(output, *call, TMPDIR=str(place)), output)
        assert code == 0 or str(place) in said or "TMPDIR" in said, (call[0], said)
    assert sorted(small_disk.rglob("*")) == before
    if (tmp_path / "cache").exists():
        assert_same_store(tmp_path / "cache", job.whole)
