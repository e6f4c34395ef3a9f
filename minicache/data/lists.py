"""Forms of rows that hold several answers to one prompt: one function for each, from columns to prompt and scored answers."""

from collections.abc import Callable
from typing import Any

from minicache.data.columns import Columns, Row
from minicache.data.layouts import Sample, instruction_of, prompt_of
from minicache.data.ranking import Answer
from minicache.data.records import Turn
from minicache.data.turns import kind_of, text_of
from minicache.errors import RowRefused


def from_ranks(columns: Columns) -> Sample:
    """`answers` are {answer, rank}, rank 1 is the best (Nectar)."""
    answers = [
        Answer(_said(each, "answer"), -_score(each, "rank"))
        for each in _objects(columns, "answers", ("answer", "rank"))
    ]
    return Sample(prompt_of(columns["prompt"], "prompt"), [], answers)


def from_posts(columns: Columns) -> Sample:
    """`answers` are {text, pm_score} to a `question` (HuggingFaceH4/stack-exchange-preferences)."""
    answers = [
        Answer(_said(each, "text"), _score(each, "pm_score"))
        for each in _objects(columns, "answers", ("text", "pm_score"))
    ]
    return Sample(prompt_of(columns["question"], "question"), [], answers)


def from_completions(columns: Columns) -> Sample:
    """`completions` are {response, overall_score, …} to an `instruction` (UltraFeedback)."""
    answers = [
        Answer(_said(each, "response"), _score(each, "overall_score"))
        for each in _objects(columns, "completions", ("response", "overall_score"))
    ]
    return Sample(prompt_of(columns["instruction"], "instruction"), [], answers)


def from_generations(columns: Columns) -> Sample:
    """`generations` and their `ratings` (or `rating`), to an `instruction`, `input` or `prompt` (distilabel)."""
    texts = columns["generations"]
    scores = columns.get("ratings", "rating")
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise RowRefused("wrong-type", "expected a list of ratings as long as 'generations'")
    name = next((name for name in ("instruction", "input", "prompt") if columns.values.get(name)), "instruction")
    rated = [(text, score) for text, score in zip(texts, scores, strict=True) if text is not None and score is not None]
    answers = [
        Answer([Turn("assistant", text_of(text, "generations"))], _number(score, "ratings")) for text, score in rated
    ]
    return Sample(prompt_of(columns[name], name), [], answers)


def from_outputs(columns: Columns) -> Sample:
    """`output` lists answers to an `instruction`, the best one first (LLaMA-Factory's comparisons)."""
    texts = columns["output"]
    if not isinstance(texts, list):
        raise RowRefused("wrong-type", f"'output' must be a list of texts, got {kind_of(texts)}")
    answers = [Answer([Turn("assistant", text_of(text, "output"))], -rank) for rank, text in enumerate(texts)]
    return Sample(instruction_of(columns), [], answers)


def has_list(name: str) -> Callable[[Row], bool]:
    """A test of a row: whether this column is a list."""
    return lambda row: isinstance(row[name], list)


def has_objects(name: str, key: str) -> Callable[[Row], bool]:
    """A test of a row: whether this column is a list of objects with this key."""
    return lambda row: isinstance(row[name], list) and all(isinstance(each, dict) and key in each for each in row[name])


# --- what these forms share ---


def _objects(columns: Columns, name: str, read: tuple[str, ...]) -> list[dict[str, Any]]:
    items = columns[name]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowRefused("wrong-type", f"{name!r} must be a list of objects, got {kind_of(items)}")
    for item in items:
        columns.leave(name, item, read)
    return items


def _said(item: dict[str, Any], key: str) -> list[Turn]:
    return [Turn("assistant", text_of(item.get(key), key))]


def _score(item: dict[str, Any], key: str) -> float:
    return _number(item.get(key), key)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RowRefused("wrong-type", f"{name!r} must be a number, got {kind_of(value)}")
    return float(value)
