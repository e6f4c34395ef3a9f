"""Forms of rows in which someone chose between two answers: one function for each, from columns to prompt and answers."""

import json
from typing import Any

from minicache.data.columns import Columns
from minicache.data.layouts import Sample, prompt_of
from minicache.data.records import Note, Turn
from minicache.data.turns import turns_of
from minicache.data.values import kind_of, number_of, text_of
from minicache.errors import RowRefused


def from_safety(columns: Columns) -> Sample:
    """`response_0`, `response_1` and `better_response_id`, the more helpful one (PKU-SafeRLHF).

    Its authors train on that preference, also where both are unsafe (align-anything, configs/template.py); such rows are counted.
    """
    sides = _texts(columns, "response_0", "response_1")
    sample = _voted(prompt_of(columns["prompt"], "prompt"), sides, _one_of(columns, "better_response_id", {0: 0, 1: 1}))
    is_safe = [columns[name] for name in ("is_response_0_safe", "is_response_1_safe") if name in columns]
    return sample._replace(notes=(Note("both-unsafe"),)) if is_safe == [False, False] else sample


def from_strength(columns: Columns) -> Sample:
    """`response_1`, `response_2`, and `preference_strength` from -3, the first is better, to 3 (HelpSteer2's preferences)."""
    sides = _texts(columns, "response_1", "response_2")
    return _voted(prompt_of(columns["prompt"], "prompt"), sides, _by_sign(columns, "preference_strength"))


def from_overall(columns: Columns) -> Sample:
    """`context`, `response1`, `response2`, and `overall_preference` from -3, the first is better, to 3 (HelpSteer3)."""
    sides = _texts(columns, "response1", "response2")
    return _voted(prompt_of(columns["context"], "context"), sides, _by_sign(columns, "overall_preference"))


def from_upvotes(columns: Columns) -> Sample:
    """`history` is a post, `human_ref_A` and `human_ref_B` are comments, and `labels` is 1 where A is preferred (SHP)."""
    sides = _texts(columns, "human_ref_A", "human_ref_B")
    return _voted(prompt_of(columns["history"], "history"), sides, _one_of(columns, "labels", {1: 0, 0: 1}))


def from_scores(columns: Columns) -> Sample:
    """`question`, `answer_0`, `answer_1` and their scores `score_0`, `score_1` (WebGPT comparisons)."""
    question = columns["question"]
    if isinstance(question, dict):
        question = question.get("full_text")
    scores = [number_of(columns[name], name) for name in ("score_0", "score_1")]
    winner = None if scores[0] == scores[1] else int(scores[1] > scores[0])
    return _voted(prompt_of(question, "question"), _texts(columns, "answer_0", "answer_1"), winner)


def from_summaries(columns: Columns) -> Sample:
    """`summaries` of a text, [{text}, {text}], and `choice`, the index of the better one (summarize_from_feedback).

    The prompt is a column of `--columns`, such as `prompt=info.post`: the data set leaves its words to its users.
    """
    if "prompt" not in columns:
        raise RowRefused(
            "missing-field", "the row has summaries and no prompt; expected --columns prompt=info.post or the like"
        )
    summaries = columns["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise RowRefused("wrong-type", f"'summaries' must be a list of two, got {kind_of(summaries)}")
    texts = [text_of(each.get("text") if isinstance(each, dict) else each, "summaries") for each in summaries]
    sides = [[Turn("assistant", text)] for text in texts]
    return _voted(prompt_of(columns["prompt"], "prompt"), sides, _one_of(columns, "choice", {0: 0, 1: 1}))


def from_arena(columns: Columns) -> Sample:
    """`conversation_a`, `conversation_b` and `winner`: model_a, model_b or a tie (Chatbot Arena)."""
    sides = [turns_of(columns[name], name) for name in ("conversation_a", "conversation_b")]
    known = {"model_a": 0, "a": 0, "model_b": 1, "b": 1, "tie": None, "tie (bothbad)": None, "both_bad": None}
    return _voted([], sides, _one_of(columns, "winner", known))


def from_votes(columns: Columns) -> Sample:
    """`prompt`, `response_a`, `response_b`: JSON lists of each turn's text; and who won (arena-human-preference-55k)."""
    prompts, *answers = (_json_texts(columns[name], name) for name in ("prompt", "response_a", "response_b"))
    sides = [
        [
            turn
            for asked, said in zip(prompts, texts, strict=False)
            for turn in (Turn("user", asked), Turn("assistant", said))
        ]
        for texts in answers
    ]
    if any(len(texts) != len(prompts) for texts in answers):
        raise RowRefused("wrong-type", f"expected an answer to each of {len(prompts)} prompts")
    won = [columns.get(f"winner_{name}") or 0 for name in ("model_a", "model_b", "tie")]
    if sorted(won) != [0, 0, 1]:
        raise RowRefused("wrong-type", "expected one of winner_model_a, winner_model_b and winner_tie to be 1")
    return _voted([], sides, (0, 1, None)[won.index(1)])


def from_labels(columns: Columns) -> Sample:
    """`output_1`, `output_2` to an `instruction`, and `label`, the number of the better one (offsetbias)."""
    sides = _texts(columns, "output_1", "output_2")
    return _voted(prompt_of(columns["instruction"], "instruction"), sides, _one_of(columns, "label", {1: 0, 2: 1}))


def from_judged(columns: Columns) -> Sample:
    """`orig_response_A`, `orig_response_B` to `orig_instruction`, and `orig_preference` (prometheus-eval/Preference-Collection).

    Its `instruction`, `input` and `output` are what the judge read and wrote: they are listed.
    """
    judged = [name for name in ("instruction", "input", "output") if columns.get(name) is not None]
    sides = _texts(columns, "orig_response_A", "orig_response_B")
    winner = _one_of(columns, "orig_preference", {"A": 0, "B": 1})
    sample = _voted(prompt_of(columns["orig_instruction"], "orig_instruction"), sides, winner)
    return sample._replace(notes=tuple(Note("unused", name) for name in judged))


# --- what these forms share ---


def _texts(columns: Columns, first: str, second: str) -> list[list[Turn]]:
    return [[Turn("assistant", text_of(columns[name], name))] for name in (first, second)]


def _voted(prompt: list[Turn], sides: list[list[Turn]], winner: int | None) -> Sample:
    """The pair of the winner, 0 or 1, and the other one. Raises RowRefused: nobody won."""
    if winner is None:
        raise RowRefused("tie", "neither answer is preferred")
    return Sample(prompt, [(sides[winner], sides[1 - winner])])


def _one_of(columns: Columns, name: str, known: dict[Any, int | None]) -> int | None:
    """The winner that a column names. Raises RowRefused: it has another value."""
    value = columns[name]
    if isinstance(value, list | dict) or value not in known:
        raise RowRefused(
            "wrong-type", f"{name!r}: expected one of {', '.join(map(str, known))}, got {str(value)[:40]!r}"
        )
    return known[value]


def _by_sign(columns: Columns, name: str) -> int | None:
    """The first answer where a strength is below 0, the second where it is above."""
    strength = number_of(columns[name], name)
    return None if strength == 0 else int(strength > 0)


def _json_texts(value: object, field: str) -> list[str]:
    try:
        texts = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list):
        raise RowRefused("wrong-type", f"{field!r}: expected a JSON list of texts, got {str(value)[:40]!r}")
    return [text_of(text, field) for text in texts]
