"""Writing whole: flushed before and after the rename, no trace of a failure, leftovers of killed calls removed, others' kept."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from minicache import disk, failures
from minicache import drafts as naming
from minicache.disk import (
    flush_to_disk,
    folder_written_whole,
    make_folder,
    read_json,
    replace_folder,
    write_json,
    written_whole,
)
from minicache.drafts import draft_of, drafts, remove_leftovers
from minicache.errors import OutputError

Steps = list[tuple[str, str]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What the disk is asked to do, in order: ("flush", name) and ("rename", name of the target); a draft's name is "draft"."""
    seen: Steps = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append(("flush", "draft" if place.name.endswith(".draft") else place.name))
        fsync(descriptor)

    def seen_replace(self: Path, target: Path) -> Path:
        seen.append(("rename", target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    return seen


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@needs_proc
def test_run_json_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path: Path, steps: Steps) -> None:
    write_json(tmp_path / "run.json", {"steps": 3})
    assert steps == [("flush", "draft"), ("rename", "run.json"), ("flush", tmp_path.name)]
    assert read_json(tmp_path / "run.json") == {"steps": 3}


@needs_proc
def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path: Path, steps: Steps) -> None:
    with folder_written_whole(tmp_path / "model") as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "weights").write_text("x")
    assert sorted(steps[:3]) == [("flush", "draft"), ("flush", "inner"), ("flush", "weights")]
    assert steps[3:] == [("rename", "model"), ("flush", tmp_path.name)]


@needs_proc
def test_a_folder_that_takes_another_s_place_is_flushed_before_the_other_leaves(tmp_path: Path, steps: Steps) -> None:
    for name, content in (("folder", "old"), ("draft", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(content)
    replace_folder(tmp_path / "draft", tmp_path / "folder")
    renames = [at for at, (what, _) in enumerate(steps) if what == "rename"]
    assert steps[: renames[0]] == [("flush", "a"), ("flush", "draft")] and steps[renames[1]] == ("rename", "folder")
    assert (tmp_path / "folder" / "a").read_text() == "new" and [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_where_it_cannot_the_other_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("folder", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)

    def refuse(draft: Path, folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk, "publish_folder", refuse)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(tmp_path / "draft", tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_text() == "folder"


def test_new_folders_are_flushed_into_those_above_them(tmp_path: Path, steps: Steps) -> None:
    make_folder(tmp_path / "a" / "b")
    assert sorted(steps) == sorted([("flush", "a"), ("flush", tmp_path.name)])
    steps.clear()
    make_folder(tmp_path / "a" / "b")
    assert steps == []


def fill(place: Path) -> None:
    if place.is_dir():
        (place / "half").write_text("half")
    else:
        place.write_text("half")


WAYS = [written_whole, folder_written_whole]
Way = Callable[..., AbstractContextManager[Path]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_nothing(tmp_path: Path, way: Way, error: BaseException) -> None:
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)), way(tmp_path / "out") as draft:
        fill(draft)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {(1, 2): 1})  # type: ignore[dict-item]
    assert read_json(tmp_path / "run.json") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_folder_takes_no_other_ones_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        with pytest.raises(OutputError, match="exists already"), folder_written_whole(tmp_path / name):
            pytest.fail("began to write")
    assert (tmp_path / "out" / "mine").exists()


def test_a_folder_whose_parent_is_not_flushed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(places: list[Path]) -> None:
        if list(places) == [tmp_path]:
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(disk, "flush_to_disk", failing)
    with pytest.raises(OutputError, match="cannot be written: broken"), folder_written_whole(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


# --- leftovers ---

KILLED = """
import os, signal, sys
from pathlib import Path
from minicache.disk import written_whole, folder_written_whole
way = written_whole if sys.argv[2] == "file" else folder_written_whole
with way(Path(sys.argv[1])) as draft:
    (draft if sys.argv[2] == "file" else draft / "inner").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("kind", "way"), [("file", written_whole), ("folder", folder_written_whole)])
def test_what_a_killed_call_left_is_removed_by_the_next(tmp_path: Path, kind: str, way: Way) -> None:
    place = tmp_path / "out.[x]"
    subprocess.run([sys.executable, "-c", KILLED, str(place), kind], check=False)
    (leftover,) = tmp_path.iterdir()
    assert drafts(tmp_path, place.name) == [leftover]
    with way(tmp_path / "other") as draft:
        fill(draft)
    assert leftover.exists(), "another file's is not touched"
    with way(place) as draft:
        fill(draft)
        assert not leftover.exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["other", place.name]


@pytest.mark.parametrize("way", WAYS)
def test_two_at_once_do_not_disturb_each_other(tmp_path: Path, way: Way) -> None:
    with way(tmp_path / "out") as first:
        fill(first)
        remove_leftovers(tmp_path, "out")
        assert first.exists() and draft_of(tmp_path / "out") != first


def named(place: Path, old: str, new: str) -> Path:
    """A draft as `draft_of` names it, with a part of its name changed, and made."""
    draft = draft_of(place)
    draft = draft.with_name(draft.name.replace(old, new))
    draft.touch()
    return draft


def test_which_drafts_are_leftovers(tmp_path: Path) -> None:
    place, pid = tmp_path / "out", os.getpid()
    ours = named(place, "", "")
    earlier_life = named(place, naming._process(), "00000000")  # of a container whose processes had the same numbers
    of_parent = named(place, f"-{pid}-", f"-{os.getppid()}-")
    of_dead = named(place, f"-{pid}-", "-99999999999-")
    elsewhere, old_elsewhere = (
        named(place, f".{naming._machine()}-", f".{machine}-") for machine in ("0" * 8, "f" * 8)
    )
    earlier_version, old_version = tmp_path / ".out.123.draft", tmp_path / ".out.456.draft"
    for draft in (earlier_version, old_version):
        draft.touch()
    for draft in (ours, of_parent, old_elsewhere, old_version):
        os.utime(draft, (0, 0))
    remove_leftovers(tmp_path, "out")
    left = {ours, of_parent, elsewhere, earlier_version}
    assert set(tmp_path.iterdir()) == left
    assert not earlier_life.exists() and not of_dead.exists()


def test_a_draft_of_a_draft_is_left_over_with_its_process(tmp_path: Path) -> None:
    place = tmp_path / "cache"
    ours = draft_of(draft_of(place))
    killed = named(draft_of(place), f"-{os.getpid()}-", f"-{2**31}-")
    ours.touch()
    remove_leftovers(tmp_path, place.name)
    assert list(tmp_path.iterdir()) == [ours] and not killed.exists()


def test_long_names_have_drafts(tmp_path: Path) -> None:
    place = tmp_path / ("很" * 80 + ".json")
    write_json(place, {})
    assert list(tmp_path.iterdir()) == [place]
    leftover = named(place, f"-{os.getpid()}-", "-99999999999-")
    assert drafts(tmp_path, place.name) == [leftover]


def test_drafts_of_a_container_are_not_those_of_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers may share the machine's name; the same numbers are other processes there."""
    live = draft_of(tmp_path / "out")
    gone = live.with_name(live.name.replace(f"-{os.getpid()}-", "-99999999999-"))
    gone.touch()
    naming._machine.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "pid:[4026539999]")
        remove_leftovers(tmp_path, "out")
        assert gone.exists() and naming._machine() != naming.DRAFT.search(live.name)["machine"]  # type: ignore[index]
    naming._machine.cache_clear()
    remove_leftovers(tmp_path, "out")
    assert not gone.exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_place_that_another_process_has_filled_meanwhile_is_left_to_it(tmp_path: Path, way: Way) -> None:
    """Two `export` into one place."""
    place = tmp_path / "out"
    more = {"is_new": True} if way is written_whole else {}
    with (
        pytest.raises(OutputError, match=f"{place}: another process has made it meanwhile"),
        way(place, **more) as draft,
    ):
        fill(draft)
        if way is folder_written_whole:
            place.mkdir()
            (place / "theirs").touch()
        else:
            place.write_text("theirs")
    assert list(tmp_path.iterdir()) == [place]


# --- temporary files, lines, and the errors of libraries ---


def test_temporary_files_of_a_killed_call_are_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "gettempdir", lambda: str(tmp_path))
    with disk.scratch_folder("test") as mine, disk.scratch_folder("test") as other:
        assert mine != other and mine.stat().st_mode & 0o77 == 0
        (mine / "file").touch()
        killed = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-99999999999-"))
        killed.mkdir()
    with disk.scratch_folder("test"):
        assert not killed.exists()
    assert list(tmp_path.iterdir()) == []


def test_no_directory_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found in [...]")

    monkeypatch.setattr(disk, "gettempdir", none)
    with pytest.raises(OutputError, match="name one in the variable TMPDIR"), disk.scratch_folder("test"):
        pytest.fail("began")


def test_a_journal_on_a_full_disk_says_so_once() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    journal = disk.Journal(Path("/dev/full"))
    with pytest.raises(OutputError, match="the disk is full"):
        journal.add("line\n")
    journal.close(flush=True)


def test_a_journal_appends_lines(tmp_path: Path) -> None:
    for line in ("a\n", "ä\n"):
        journal = disk.Journal(tmp_path / "file")
        journal.add(line)
        assert (tmp_path / "file").read_text(encoding="utf-8").endswith(line), "at once"
        journal.close(flush=True)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "a\nä\n"


def wrapped(inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EROFS, "read only"), errno.EROFS),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),
        (wrapped(OSError(errno.EDQUOT, "quota")), errno.EDQUOT),
        (RuntimeError("something else"), None),
    ],
)
def test_the_error_of_the_system_behind_that_of_a_library(tmp_path: Path, error: Exception, number: int | None) -> None:
    assert failures.system_error(error, tmp_path).errno == number


def test_messages_name_the_place_and_not_its_draft(tmp_path: Path) -> None:
    draft = draft_of(tmp_path / "step-000002") / "model"
    for place in (draft, tmp_path / "..step-000002.merging-12345678.creating-0123abcd" / "model"):
        with (
            pytest.raises(OutputError, match=f"^{tmp_path}/step-000002/model: the disk is full"),
            failures.writing(place),
        ):
            raise OSError(errno.ENOSPC, "full")


# --- folders that cannot be flushed ---


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_a_folder_that_cannot_be_flushed_is_no_error_and_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "file").touch()

    def refuse(descriptor: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    flush_to_disk([tmp_path])
    with pytest.raises(OSError, match="no"):
        flush_to_disk([tmp_path / "file"])


def test_another_failure_to_flush_a_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="broken"):
        flush_to_disk([tmp_path])


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text(json.dumps([1]))
    with pytest.raises(OutputError, match="expected a JSON object"):
        read_json(tmp_path / "x")


def refusing_replace(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """Let renames fail so often, as where a virus scanner looks at a file; returns the targets."""
    tried: list[Path] = []
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        tried.append(target)
        if len(tried) <= times:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(disk, "PAUSES", (0.001, 0.001))
    return tried


def test_a_file_that_another_program_holds_for_a_moment_is_renamed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = refusing_replace(monkeypatch, 2)
    write_json(tmp_path / "a.json", {"a": 1})
    assert len(tried) == 3 and read_json(tmp_path / "a.json") == {"a": 1}


def test_a_file_that_stays_held_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing_replace(monkeypatch, 3)
    with pytest.raises(OutputError, match=r"a.json: cannot be written: Access is denied"):
        write_json(tmp_path / "a.json", {"a": 1})
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_gives_way_on_windows_and_a_full_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "WINDOWS", True)
    (tmp_path / "empty").mkdir()
    removed: list[Path] = []
    rmdir = Path.rmdir

    def noted(folder: Path) -> None:
        removed.append(folder)
        rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", noted)
    with folder_written_whole(tmp_path / "empty") as draft:
        (draft / "file").write_text("x")
    assert removed == [tmp_path / "empty"] and (tmp_path / "empty/file").read_text() == "x"
    with pytest.raises(OutputError, match="exists already"), folder_written_whole(tmp_path / "empty"):
        pytest.fail("it is not empty")
