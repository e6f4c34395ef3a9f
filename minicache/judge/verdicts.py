"""The file of verdicts: a line as soon as one comes, so that the same command asks only for what is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from minicache.cache.places.claims import FileClaim
from minicache.disk import Journal, check_writable, read_whole, written_whole
from minicache.errors import DataError, OutputError
from minicache.json_lines import json_lines, to_json_lines
from minicache.judge.question import Verdict
from minicache.strict import read_as

# Characters of a reply that are kept.
LONGEST_REPLY = 2000


@dataclass(frozen=True)
class Ruling:
    """A verdict, as a line of the file.

    digest: of the judge's name and all it read, see `digest_of`. policy_is_a: the order of the answers. verdict: None where the
    reply gives none. reply: what it said. is_cut, max_tokens: whether that limit ended the reply. read, written: its tokens.
    """

    digest: str
    model: str
    policy_is_a: bool
    verdict: Verdict | None
    reply: str
    is_cut: bool
    max_tokens: int
    read: int = 0
    written: int = 0

    @property
    def choice(self) -> str | None:
        """Who is better: "policy", "reference", "tie", or None."""
        if self.verdict in (None, "tie"):
            return self.verdict
        return "policy" if (self.verdict == "A") == self.policy_is_a else "reference"


class Verdicts:
    """The verdicts of a file by digest, and those that are added to it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._found = {each.digest: each for each in read_verdicts(file)}
        self._journal: Journal | None = None

    def get(self, digest: str, max_tokens: int) -> Ruling | None:
        """The verdict of this digest; None where it is to be asked for, as after a reply that a lower limit cut."""
        found = self._found.get(digest)
        if found and found.verdict is None and found.is_cut and found.max_tokens < max_tokens:
            return None
        return found

    def add(self, ruling: Ruling) -> None:
        """Write a verdict, at once. Raises OutputError: the disk is full or refuses."""
        self._found[ruling.digest] = ruling
        if self._journal is None:
            self._journal = Journal(self.file)
        self._journal.add(to_json_lines([asdict(ruling)]))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only this process adds verdicts within the block.

        Raises:
            OutputError: another process adds some, or the file cannot be written.
        """
        check_writable(self.file)
        claim = FileClaim(self.file.with_name(f".{self.file.name}.lock"))
        if not claim.take(alone=True):
            raise OutputError(
                f"{self.file}: another process adds verdicts; wait for its end, or name another --verdicts"
            )
        try:
            found = read_verdicts(self.file)
            self._found |= {each.digest: each for each in found}
            if self.file.exists() and not read_whole(self.file).endswith(b"\n"):
                # a kill broke the last line off
                with written_whole(self.file) as draft:
                    draft.write_text(to_json_lines(map(asdict, found)), encoding="utf-8", newline="\n")
            yield
        finally:
            try:
                self._close()
            finally:
                claim.remove()

    def _close(self) -> None:
        if self._journal is not None:
            journal, self._journal = self._journal, None
            journal.close(flush=True)


def read_verdicts(file: Path) -> list[Ruling]:
    """The verdicts in a file, none where there is no file. The last line may be torn by a kill.

    Raises:
        DataError: it is no file of verdicts.
    """
    try:
        content = read_whole(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"--verdicts {file}: cannot be read: {error}") from error
    found, torn = [], b"" if content.endswith(b"\n") else content.rpartition(b"\n")[2]
    for line in json_lines(content):
        try:
            found.append(read_as(Ruling, line.value, "verdict", skip_unknown=True))
        except (ValueError, TypeError) as error:
            if line.error and torn.startswith(b'{"digest"'[: len(torn)]) and line.text == torn.decode(errors="replace"):
                continue
            raise DataError(
                f"--verdicts {file}, line {line.number}: expected a verdict that compare wrote, got {line.text[:60]!r}; name a "
                "file of verdicts, or a new one"
            ) from error
    return found
