"""Answers before and after training, as `compare --jsonl` wrote them, on the page of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache.disk import read_whole
from minicache.errors import DataError
from minicache.json_lines import json_lines
from minicache.text import phrase

SHOWN_ANSWERS, LONGEST = 40, 6000  # prompts; characters of one text
LONGEST_HEADING = 90  # characters of a prompt that stand above its answers


@dataclass(frozen=True)
class Answer:
    """A line of `compare --jsonl`. sides: of reference and policy, the text and whether it was cut. models: their names."""

    prompt: str
    sides: dict[str, tuple[str, bool]]
    models: dict[str, str]


def read_answers(file: Path) -> list[Answer]:
    """What `compare --jsonl` wrote.

    Raises:
        DataError: the file cannot be read, or a line of it is none of compare's.
    """
    try:
        content = read_whole(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    answers = []
    for line in json_lines(content):
        row = line.value
        try:
            sides = {side: (str(row[side]), bool(row.get(f"{side}_cut"))) for side in ("reference", "policy")}
            answers.append(Answer(str(row["prompt"]), sides, dict(row.get("models") or {})))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(
                f"{file}, line {line.number}: expected an object with 'prompt', 'reference' and 'policy', as compare --jsonl "
                f"writes it; got {line.text[:60]!r}"
            ) from line.error
    return answers


def answers_part(run: Path, answers: list[Answer]) -> dict[str, Any] | None:
    if not answers:
        return None
    policy = str(answers[0].models.get("policy", ""))
    return {
        "reference": answers[0].models.get("reference") or phrase("the reference"),
        "policy": policy or phrase("the policy"),
        "of_this_run": not policy or run.resolve() in (place := Path(policy).resolve(), *place.parents),
        "answers": [_answer(answer) for answer in answers[:SHOWN_ANSWERS]],
        "count": len(answers),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    title = " ".join(answer.prompt.split())
    whole = len(title) <= LONGEST_HEADING
    sides = [
        {"heading": heading, "kind": kind, "text": _shortened(answer.sides[side][0]), "cut": answer.sides[side][1]}
        for side, heading, kind in (("reference", "Before", "rejected"), ("policy", "After", "chosen"))
    ]
    return {
        "heading": title if whole else f"{title[:LONGEST_HEADING]}…",
        "prompt": "" if whole and title == answer.prompt else _shortened(answer.prompt),
        "sides": sides,
    }


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return phrase("{text} … {count:,} characters left out", text=text[:LONGEST], count=len(text) - LONGEST)
