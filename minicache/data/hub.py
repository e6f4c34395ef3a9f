"""Data sets of the Hugging Face Hub: `org/name`, `org/name:config@split?revision=v1`, by huggingface_hub.

Only files with rows are downloaded, into the library's own cache, where a killed call finds them again. No script of a data set
runs. The revision becomes a commit, which stands in the name of each file: `org/name@COMMIT:data/train.parquet`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minicache.data.files import DataFile
from minicache.data.folders import MOST_ABOUT, Folder, Note
from minicache.errors import DataError, MinicacheError, StoreError
from minicache.hub import PART, endpoint
from minicache.text import one_line

REVISION = "?revision="
NAME = re.compile(
    rf"(?P<id>{PART}/{PART})(?::(?P<config>[^@?]+))?(?:@(?P<split>[^@:?]+))?(?:{re.escape(REVISION)}(?P<revision>.+))?"
)
# As files are named in logs.
FILE = re.compile(rf"(?P<id>{PART}/{PART})@(?P<commit>[0-9a-f]{{40}}):(?P<file>.+)")


@dataclass(frozen=True)
class DataSet:
    """A data set as a user names it; "" for what is not named. value: all of it."""

    value: str
    id: str
    config: str = ""
    split: str = ""
    revision: str = ""

    @property
    def name(self) -> str:
        """Its name with the configuration."""
        return f"{self.id}:{self.config}" if self.config else self.id


def fetch(value: str, note: Note) -> list[DataFile] | None:
    """The files of the data set, or the one file of it, that a value names; None if a value has another form.

    Raises:
        DataError: there is no such data set, configuration, split or file. StoreError: the Hub cannot be reached.
    """
    if found := FILE.fullmatch(value):
        one = DataSet(value, found["id"], revision=found["commit"])
        with _in_one_line(one):
            return [_download(one, found["commit"], found["file"])]
    if not (found := NAME.fullmatch(value)):
        return None
    asked = DataSet(value, **{name: text or "" for name, text in found.groupdict().items()})
    with _in_one_line(asked):
        commit, names = _listing(asked)

        def read(name: str) -> str:
            with _download(asked, commit, name).path.open(encoding="utf-8", errors="replace") as stream:
                return stream.read(MOST_ABOUT)

        chosen = Folder(asked.id, names, read).select(asked.config, asked.split, note)
        return [_download(asked, commit, name) for name in chosen]


def _listing(asked: DataSet) -> tuple[str, list[str]]:
    """The commit of a revision and its files; without a network those that are in the library's cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        folder = Path(
            snapshot_download(asked.id, repo_type="dataset", revision=asked.revision or None, local_files_only=True)
        )
        return folder.name, [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    info = HfApi(endpoint()).dataset_info(asked.id, revision=asked.revision or None, timeout=60)
    if not info.sha:
        raise DataError(f"{asked.value}: {endpoint()} names no commit of it")
    return info.sha, [each.rfilename for each in info.siblings or ()]


def _download(asked: DataSet, commit: str, name: str) -> DataFile:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(asked.id, name, repo_type="dataset", revision=commit, endpoint=endpoint())
    return DataFile(f"{asked.id}@{commit}:{name}", Path(path))


@contextmanager
def _in_one_line(asked: DataSet) -> Iterator[None]:
    """Turn the library's errors, and those of the libraries below it, into one line."""
    from huggingface_hub import errors

    value, hub = asked.value, endpoint()
    try:
        yield
    except MinicacheError:
        raise
    except errors.GatedRepoError as error:
        raise DataError(
            f"{value}: its owners ask for consent first: accept their terms at {hub}/datasets/{asked.id}, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{value}: no such file or directory, and {hub} has no data set {asked.id} that you may see (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{value}: the data set {asked.id} has no revision {asked.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise DataError(
            f"{value}: no such file or directory, and the data set {asked.id} is not among the downloaded ones; with a network "
            "it can be fetched (HF_HUB_OFFLINE=0), without one add ?revision=COMMIT, the commit that was downloaded"
        ) from error
    except errors.EntryNotFoundError as error:
        raise DataError(f"{value}: the data set {asked.id} has no such file at this commit") from error
    # Of HTTP libraries that change with the version.
    except Exception as error:
        raise StoreError(
            f"{value}: no such file or directory, and as a data set it cannot be fetched from {hub}; check network and name, then "
            f"run the same command again: {one_line(error, 300)}"
        ) from error
