"""A repository of the Hugging Face Hub to write to, by huggingface_hub. No torch."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache.errors import ConfigError
from minicache.hub import LOGIN, endpoint, in_one_line, quiet

log = logging.getLogger(__name__)

# Files of one commit, and bytes of those that may become part of its request: the Hub gives up on one with many more.
MOST_FILES, MOST_BYTES = 1000, 2**28
# Bytes from which a file never is part of the request.
LARGE = 10**7
Content = Path | bytes


@dataclass(frozen=True)
class Found:
    """What is there before. commit: the newest. card: its README.md, None without one."""

    private: bool
    commit: str
    files: frozenset[str]
    card: str | None


@dataclass(frozen=True)
class Repository:
    """A repository by its name. kind: "model" or "dataset"."""

    kind: str
    id: str

    def look(self) -> Found | None:
        """What is there; None if there is no such repository that the token may see.

        Raises:
            ConfigError: there is no token, or the Hub does not know it. StoreError: the Hub cannot be asked.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        if not get_token():
            raise ConfigError(f"{self.id}: writing to the Hub needs a token; {LOGIN}")
        with in_one_line(self.id, self.kind, self.id), quiet():
            try:
                info: Any = self._api().repo_info(self.id, repo_type=self.kind, timeout=60)
            except RepositoryNotFoundError:
                return None
            names = frozenset(each.rfilename for each in info.siblings or ())
            card = self._read("README.md", info.sha) if "README.md" in names else None
            return Found(bool(info.private), info.sha or "", names, card)

    def make(self, private: bool) -> None:
        """Make it. Raises ConfigError: the token may not."""
        with in_one_line(self.id, self.kind, self.id):
            self._api().create_repo(self.id, repo_type=self.kind, private=private)

    def send(
        self,
        files: Mapping[str, Content],
        last: str,
        gone: list[str],
        has: Collection[str],
        message: str,
        begin: Callable[[str], None],
    ) -> str:
        """Write files and delete those that are `gone`, in one commit if they are few; returns the newest commit.

        Files that are there already are not sent again. Of many, `last` is deleted first and written last: a reader between two
        commits finds that the whole is not there. has: the files there now. begin: called with what begins.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in sorted(files.items(), key=lambda each: each[0] == last)
        ]
        parts = _parts(adds)
        names = [*gone, *([last] if len(parts) > 1 and last in has else [])]
        deletes = [CommitOperationDelete(name) for name in names]
        commit = ""
        for number, part in enumerate(parts, start=1):
            begin(f"sending {len(part):,} files" + (f", part {number} of {len(parts)}" if len(parts) > 1 else ""))
            operations: list[Any] = [*(deletes if number == 1 else []), *part]
            with in_one_line(self.id, self.kind, self.id), quiet():
                done = self._api().create_commit(
                    self.id, operations, commit_message=message, repo_type=self.kind, num_threads=4
                )
            commit = done.oid
            log.debug("%s: part %d of %d is commit %s", self.id, number, len(parts), commit)
        return commit

    def _read(self, name: str, revision: str) -> str:
        from huggingface_hub import hf_hub_download

        file = hf_hub_download(self.id, name, repo_type=self.kind, revision=revision, endpoint=endpoint())
        return Path(file).read_text(encoding="utf-8", errors="replace")

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint(), library_name="minidpo")


def _parts(adds: list[Any]) -> list[list[Any]]:
    """The files of each commit, in their order. adds: operations of the library."""
    parts: list[list[Any]] = []
    room = 0
    for each in adds:
        size = each.upload_info.size if each.upload_info.size < LARGE else 0
        if not parts or len(parts[-1]) == MOST_FILES or size > room:
            parts.append([])
            room = MOST_BYTES
        parts[-1].append(each)
        room -= size
    return parts
