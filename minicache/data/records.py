"""Turn and Pair: a preference as text, before any tokenizer."""

from dataclasses import dataclass

from minicache.errors import RowRefused

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. role: one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt.

    prompt: the turns that both sides share.
    chosen, rejected: the turns that follow; each begins with an assistant turn.
    file, line: origin of the pair: the file as the user named it; the line, or the row of a JSON array or parquet file, from 1.
    """

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    file: str = ""
    line: int = 0

    @property
    def characters(self) -> int:
        """Characters of both sides together, the prompt counted on each."""
        return sum(len(turn.content) for turns in (self.prompt * 2, self.chosen, self.rejected) for turn in turns)

    @classmethod
    def from_conversations(cls, chosen: list[Turn], rejected: list[Turn], file: str = "", line: int = 0) -> "Pair":
        """Split two whole conversations at the first turn in which they differ.

        Raises:
            RowRefused: nothing differs, there is no prompt, a side has no answer, or the sides differ before an answer begins.
        """
        if not chosen or not rejected:
            raise RowRefused("empty-answer", f"{'chosen' if not chosen else 'rejected'} has no turns")
        if chosen == rejected:
            raise RowRefused("identical", "chosen and rejected are the same text")
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared and chosen[0].role == rejected[0].role == "assistant":
            raise RowRefused("missing-field", "there is no prompt: nothing precedes the answers")
        for name, turns in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
            if not turns or not any(turn.content.strip() for turn in turns if turn.role == "assistant"):
                raise RowRefused("empty-answer", f"{name} has no answer of its own")
            if turns[0].role != "assistant":
                raise RowRefused(
                    "prompts-differ", f"the sides differ first in a {turns[0].role} turn, not in an answer"
                )
            if not turns[-1].content.strip() or turns[-1].role != "assistant":
                raise RowRefused("empty-answer", f"{name} does not end in an answer")
        prompt, own, other = (tuple(turns) for turns in (chosen[:shared], chosen[shared:], rejected[shared:]))
        return cls(prompt=prompt, chosen=own, rejected=other, file=file, line=line)
