"""Forms of rows that hold several answers to one prompt: one function for each, from columns to prompt and scored answers."""

from collections.abc import Callable
from typing import Any

from minicache.data.columns import Columns, Row
from minicache.data.layouts import Sample, answer_of, instruction_of, prompt_of, transcribed
from minicache.data.ranking import Answer
from minicache.data.records import Turn
from minicache.data.values import kind_of, number_of, text_of
from minicache.errors import RowRefused


def from_ranks(columns: Columns) -> Sample:
    """`answers` are {answer, rank}, rank 1 is the best (Nectar)."""
    answers = [
        Answer(_said(each, "answer"), -_score(each, "rank"))
        for each in _objects(columns, "answers", ("answer", "rank"))
    ]
    return Sample(transcribed(columns["prompt"], "prompt"), [], answers)


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


def from_completion_ranks(columns: Columns) -> Sample:
    """`completions` are {rank, completion: turns} to the turns of a `context`, rank 0 is the best (NeMo RL)."""
    items = _objects(columns, "completions", ("rank", "completion"))
    answers = [Answer(answer_of(each.get("completion"), "completion"), -_score(each, "rank")) for each in items]
    return Sample(prompt_of(columns["context"], "context"), [], answers)


def from_generations(columns: Columns) -> Sample:
    """`generations` and their `ratings` (or `rating`), to an `instruction`, `input` or `prompt` (distilabel)."""
    texts = columns["generations"]
    scores = columns.get("ratings", "rating")
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        raise RowRefused("wrong-type", "expected a list of ratings as long as 'generations'")
    name = columns.first("instruction", "input", "prompt", "messages") or "instruction"
    rated = [(text, score) for text, score in zip(texts, scores, strict=True) if text is not None and score is not None]
    answers = [
        Answer([Turn("assistant", text_of(text, "generations"))], number_of(score, "ratings")) for text, score in rated
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


def has_items_with(name: str, key: str) -> Callable[[Row], bool]:
    """A test of a row: whether this column is a list of objects with this key."""
    return lambda row: isinstance(row[name], list) and all(isinstance(item, dict) and key in item for item in row[name])


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
    return number_of(item.get(key), key)
