"""The pairs of a list of answers that are ranked or scored."""

from typing import NamedTuple

from minicache.data.records import Note, Turn
from minicache.errors import RowRefused

Sides = tuple[list[Turn], list[Turn]]


class Answer(NamedTuple):
    """One of several answers. score: higher is better; only the order counts."""

    turns: list[Turn]
    score: float


def pairs_of(answers: list[Answer], how: str) -> tuple[list[Sides], list[Note]]:
    """The pairs that --pairs asks for, better answer first, and a note where equally good answers are left out.

    The order of answers with equal scores is that of the list, so the pairs are the same on every run.

    Raises:
        RowRefused: `how` is "", there are fewer than two answers, or all are equally good.
    """
    if len(answers) < 2:
        raise RowRefused("missing-field", f"a list of answers needs two or more, got {len(answers)}")
    if not how:
        raise RowRefused(
            "several-answers",
            f"the row ranks {len(answers)} answers; expected --pairs best-worst, best-each or all",
        )
    ranked = sorted(answers, key=lambda answer: -answer.score)
    best, worst = ranked[0], min(answers, key=lambda answer: answer.score)
    wanted = {
        "best-worst": [(best, worst)],
        "best-each": [(best, other) for other in ranked[1:]],
        "all": [(one, other) for at, one in enumerate(ranked) for other in ranked[at + 1 :]],
    }[how]
    pairs = [(one.turns, other.turns) for one, other in wanted if one.score > other.score and one.turns != other.turns]
    if not pairs:
        raise RowRefused("tie", "all answers are equally good")
    return pairs, [Note("tie")] if len(pairs) < len(wanted) else []
