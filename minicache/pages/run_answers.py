"""Answers before and after training, as `compare --jsonl` wrote them, on the page of a run."""

from pathlib import Path
from typing import Any

from minicache.errors import DataError
from minicache.json_lines import json_lines
from minicache.pages.markup import Child, Html, e, together

SHOWN_ANSWERS, LONGEST = 40, 6000  # prompts; characters of one text


def read_answers(file: Path) -> list[dict[str, Any]]:
    """What `compare --jsonl` wrote.

    Raises:
        DataError: the file cannot be read, or a line of it is none of compare's.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    rows = []
    for line in json_lines(content):
        row = line.value
        try:
            said = {side: str(row[side]) for side in ("reference", "policy")}
            rows.append({**row, "said": said, "prompt": str(row["prompt"])})
        except (TypeError, KeyError):
            raise DataError(
                f"{file}, line {line.number}: expected an object with 'prompt', 'reference' and 'policy', as compare --jsonl "
                f"writes it; got {line.text[:60]!r}"
            ) from line.error
    return rows


def answers_part(run: Path, answers: list[dict[str, Any]]) -> Html | None:
    if not answers:
        return None
    models = answers[0].get("models") or {}
    policy = str(models.get("policy", ""))
    says = f"Before: {models.get('reference', 'the reference')}. After: {policy or 'the policy'}."
    other = bool(policy) and run.resolve() not in (place := Path(policy).resolve(), *place.parents)
    parts: list[Child] = [e("p", says, class_="dim")]
    if other:
        parts.append(e("p", f"These answers are of {policy}, not of this run.", class_="state bad"))
    parts += [_answer(number, row) for number, row in enumerate(answers[:SHOWN_ANSWERS], start=1)]
    if len(answers) > SHOWN_ANSWERS:
        parts.append(e("p", f"The first {SHOWN_ANSWERS} of {len(answers):,}.", class_="dim"))
    return together(parts)


def _answer(number: int, row: dict[str, Any]) -> Html:
    both = []
    for side, heading, kind in (("reference", "Before", "rejected"), ("policy", "After", "chosen")):
        cut = e("p", "Cut at the longest length allowed.", class_="dim") if row.get(f"{side}_cut") else None
        text = row["said"][side]
        said = _words(text) if text else e("p", "(no answer)", class_="dim")
        both.append(e("div", e("h4", heading), said, cut, class_=f"part {kind}"))
    title = " ".join(row["prompt"].split())
    heading = e("h3", f"{number}. ", title if len(title) <= 90 else f"{title[:90]}…")
    prompt = (
        None
        if title == row["prompt"] and len(title) <= 90
        else e("details", e("summary", "Whole prompt"), _words(row["prompt"]))
    )
    return together(heading, prompt, e("div", both, class_="answers"))


def _words(text: str) -> Html:
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} … {len(text) - LONGEST:,} characters left out"
    return e("p", shown, class_="words", dir="auto")
