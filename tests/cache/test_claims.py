"""Claims: held by one process or by several, free again however their holders end, on systems without fcntl too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import has_fcntl

from minicache.cache.places.claims import FileClaim

HOLDS = (
    "import sys, time; from pathlib import Path; from minicache.cache.places.claims import FileClaim\n"
    "claim = FileClaim(Path(sys.argv[1])); print(claim.take(alone=True), flush=True); time.sleep(100)"
)


def test_a_killed_holder_frees_it_and_until_then_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / ".claim"
    with subprocess.Popen([sys.executable, "-c", HOLDS, file], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"True\n"
        assert not FileClaim(file).take(alone=True) and not FileClaim(file).take(alone=False)
        holder.send_signal(signal.SIGKILL)
    claim = FileClaim(file)
    assert claim.take(alone=True) and file.exists()
    claim.remove()
    assert not file.exists()


def test_where_fcntl_is_missing_it_can_be_imported_and_says_that_it_cannot_be_shared(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None; from pathlib import Path\n"
        "from minicache.cache.places.claims import FileClaim; from minicache.cache.reader import ReferenceCache\n"
        "claim = FileClaim(Path(sys.argv[1])); assert not claim.is_safe; assert claim.take(alone=False)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "claim"], check=True)


def test_a_file_that_cannot_be_removed_while_it_is_open_is_removed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    claim, unlink = FileClaim(tmp_path / "claim"), Path.unlink

    def refusing(file: Path, missing_ok: bool = False) -> None:
        if claim._descriptor is not None:
            raise PermissionError(13, "used by another process")
        unlink(file, missing_ok)

    assert claim.take(alone=True)
    monkeypatch.setattr(Path, "unlink", refusing)
    claim.remove()
    assert not list(tmp_path.iterdir())


def test_shared_and_lone_claims_exclude_each_other_as_in_0_1_0(tmp_path: Path) -> None:
    """0.1.0 locks with flock itself: both versions may work at one cache."""
    import fcntl

    claim = FileClaim(tmp_path / "claim")
    (tmp_path / "claim").touch()
    with (tmp_path / "claim").open("rb+") as old:
        fcntl.flock(old, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not claim.take(alone=True) and claim.take(alone=False)
        claim.release()
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not claim.take(alone=True) and not claim.take(alone=False) and has_fcntl


def test_a_file_that_its_holder_removes_at_this_moment_is_made_anew_and_held(tmp_path: Path) -> None:
    first, second = FileClaim(tmp_path / "claim"), FileClaim(tmp_path / "claim")
    assert first.take(alone=True)
    # opened and not locked yet
    second._descriptor = os.open(tmp_path / "claim", os.O_RDWR)
    first.remove()
    assert second.take(alone=True) and not FileClaim(tmp_path / "claim").take(alone=True)
    second.remove()
    assert not list(tmp_path.iterdir())
