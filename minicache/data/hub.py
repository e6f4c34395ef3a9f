"""Data sets of the Hugging Face Hub: `org/name`, `org/name:config@split?revision=v1`, by huggingface_hub.

Only files with rows are downloaded, into the library's own cache, where a killed call finds them again. No script of a data set
runs. The revision becomes a commit, which stands in the name of each file: `org/name@COMMIT:data/train.parquet`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from minicache.data.files import DataFile
from minicache.data.folders import MOST_ABOUT, Folder, Note
from minicache.hub import PART, endpoint, in_one_line, listing

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
        OutputError: what is downloaded cannot be written.
    """
    if found := FILE.fullmatch(value):
        return [_download(DataSet(value, found["id"], revision=found["commit"]), found["commit"], found["file"])]
    if not (found := NAME.fullmatch(value)):
        return None
    asked = DataSet(value, **{name: text or "" for name, text in found.groupdict().items()})
    commit, names = _listing(asked)

    def read(name: str) -> str:
        with _download(asked, commit, name).path.open(encoding="utf-8", errors="replace") as stream:
            return stream.read(MOST_ABOUT)

    chosen = Folder(asked.id, names, read).select(asked.config, asked.split, note)
    return [_download(asked, commit, name) for name in chosen]


def _listing(asked: DataSet) -> tuple[str, list[str]]:
    """The commit of a revision and its files; without a network those that are in the library's cache."""
    from huggingface_hub import constants, snapshot_download

    what = f"{asked.value}: no such file or directory, and as a data set"
    if not constants.HF_HUB_OFFLINE:
        return listing(what, asked.id, asked.revision)
    if not asked.revision:
        what += " (without a network add ?revision=COMMIT, the commit that was downloaded)"
    with in_one_line(what, "dataset", asked.id):
        revision = asked.revision or None
        folder = Path(snapshot_download(asked.id, repo_type="dataset", revision=revision, local_files_only=True))
    return folder.name, [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _download(asked: DataSet, commit: str, name: str) -> DataFile:
    from huggingface_hub import hf_hub_download

    with in_one_line(asked.value, "dataset", asked.id):
        path = hf_hub_download(asked.id, name, repo_type="dataset", revision=commit, endpoint=endpoint())
    return DataFile(f"{asked.id}@{commit}:{name}", Path(path))
