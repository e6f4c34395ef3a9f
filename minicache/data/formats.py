"""Rows of preference files -> `Pair`s: one function for each form of a row.

The form of a row is the first in `FORMATS` that fits it, unless the user names one. A function reads the columns of its form; what
all forms share (system text, earlier turns, tools, template arguments) is read here, and so is what becomes of other columns.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from minicache.data import layouts, lists, votes
from minicache.data.columns import Columns, Reading, Row, columns_of
from minicache.data.layouts import Sample
from minicache.data.ranking import pairs_of
from minicache.data.records import Context, Pair, Turn, is_empty
from minicache.data.shared import context_of, pair_of, texts_of, whole_prompt, with_whole_tools
from minicache.data.values import kind_of, listed
from minicache.errors import RowRefused

AUTO = Reading()
# The forms of LLaMA-Factory.
FACTORY = (layouts.from_sharegpt, layouts.from_alpaca, lists.from_outputs)
# No other program's rows have all of these columns.
OF_EXPORTS = ("digest", "prompt_ids", "chosen_loss_mask")


class Format(NamedTuple):
    """A form of a row.

    fields: the columns it needs. read: the columns of a row -> prompt and answers. fits: a further test of a row.
    """

    fields: set[str]
    read: Callable[[Columns], Sample]
    fits: Callable[[Row], bool] = lambda row: True


# The first form that fits a row reads it.
FORMATS: dict[str, Format] = {
    "sharegpt": Format({"conversations", "chosen", "rejected"}, layouts.from_sharegpt, layouts.has_dialogue),
    "stack-exchange": Format({"question", "response_j", "response_k"}, layouts.from_stack_exchange),
    "ultrainteract": Format({"trajectory", "chosen", "rejected"}, layouts.from_trajectory),
    "math-step": Format({"prompt", "initial_reason_steps", "chosen", "rejected"}, layouts.from_steps),
    "messages": Format({"chosen", "rejected"}, layouts.from_messages, layouts.has_turns),
    "transcript": Format({"prompt", "chosen", "rejected"}, layouts.from_prompt_transcript, layouts.has_transcript),
    "prompt": Format({"prompt", "chosen", "rejected"}, layouts.from_prompt, layouts.has_texts),
    "hh": Format({"chosen", "rejected"}, layouts.from_transcript, layouts.is_transcript),
    "messages-texts": Format({"messages", "chosen", "rejected"}, layouts.from_messages_and_texts, layouts.has_texts),
    "alpaca": Format({"instruction", "chosen", "rejected"}, layouts.from_alpaca, layouts.has_texts),
    "orca": Format({"question", "chosen", "rejected"}, layouts.from_question, layouts.has_texts),
    "input": Format({"input", "chosen", "rejected"}, layouts.from_input, layouts.has_texts),
    "response-chosen": Format({"question", "response_chosen", "response_rejected"}, layouts.from_response_names),
    "argilla": Format({"chosen_response", "rejected_response"}, layouts.from_responses),
    "swift": Format({"messages"}, layouts.from_swift, layouts.has_rejection),
    "pku": Format({"prompt", "response_0", "response_1", "better_response_id"}, votes.from_safety),
    "helpsteer2": Format({"prompt", "response_1", "response_2", "preference_strength"}, votes.from_strength),
    "helpsteer3": Format({"context", "response1", "response2", "overall_preference"}, votes.from_overall),
    "shp": Format({"history", "human_ref_A", "human_ref_B", "labels"}, votes.from_upvotes),
    "webgpt": Format({"question", "answer_0", "answer_1", "score_0", "score_1"}, votes.from_scores),
    "summaries": Format({"summaries", "choice"}, votes.from_summaries),
    "arena": Format({"conversation_a", "conversation_b", "winner"}, votes.from_arena),
    "arena-votes": Format({"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"}, votes.from_votes),
    "offsetbias": Format({"instruction", "output_1", "output_2", "label"}, votes.from_labels),
    "prometheus": Format(
        {"orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"}, votes.from_judged
    ),
    "nemo": Format(
        {"context", "completions"}, lists.from_completion_ranks, lists.has_items_with("completions", "rank")
    ),
    "nectar": Format({"prompt", "answers"}, lists.from_ranks, lists.has_items_with("answers", "rank")),
    "answers": Format({"question", "answers"}, lists.from_posts, lists.has_items_with("answers", "pm_score")),
    "ultrafeedback": Format(
        {"instruction", "completions"}, lists.from_completions, lists.has_items_with("completions", "overall_score")
    ),
    "distilabel": Format({"generations"}, lists.from_generations),
    "outputs": Format({"instruction", "output"}, lists.from_outputs, lists.has_list("output")),
}


def to_pairs(row: object, file: str, line: int, reading: Reading = AUTO) -> list[Pair]:
    """The pairs in a row of `file` at `line`: one, or several of a ranked list.

    Raises:
        RowRefused: the row holds no pair, or something that a model is meant to see and that its form does not use; with a reason
            code and what was expected.
    """
    if not isinstance(row, dict):
        raise RowRefused("wrong-type", f"expected an object, got {kind_of(row)}")
    if "digest" in row and all(name in row for name in OF_EXPORTS):
        raise RowRefused(
            "exported", f"a table that minidpo exported: minidpo import-cache {file} --ref-cache CACHE reads it"
        )
    columns = columns_of(row, reading)
    read = _reader(columns, reading.format)
    sample = read(columns)
    notes = [*sample.notes]
    context = with_whole_tools(context_of(columns, sample), read in FACTORY, notes)
    prompt = whole_prompt(columns, sample, notes)
    if sample.answers is not None:
        made, ties = pairs_of(sample.answers, reading.pairs)
        sample, notes = sample._replace(pairs=made), notes + ties
    pairs = [pair_of(prompt, chosen, rejected) for chosen, rejected in sample.pairs]
    if columns.unread:
        notes += columns.notes(texts_of(pairs, context))
    return [replace(pair, file=file, line=line, context=context, notes=tuple(notes)) for pair in pairs]


def to_pair(row: object, file: str, line: int, format: str = "auto") -> Pair:
    """The first pair in a row, see `to_pairs`."""
    return to_pairs(row, file, line, Reading(format))[0]


def to_prompt(row: object, reading: Reading = AUTO) -> tuple[tuple[Turn, ...], Context]:
    """The turns of a prompt: a text, a row with `prompt`, `messages` or `conversations`, or the prompt of a preference row.

    Assistant turns at the end of a conversation are left out, so that files of dialogues and of pairs can be used unchanged.

    Raises:
        RowRefused: the row holds no prompt; with a reason code and what was expected.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise RowRefused("wrong-type", f"expected an object or text, got {kind_of(row)}")
    if "chosen" in row or "rejected" in row or "response_j" in row:
        pair = to_pairs(row, "", 0, reading)[0]
        return pair.prompt, pair.context
    columns = columns_of(row, reading)
    field = next((name for name in ("messages", "conversations", "prompt") if name in columns), None)
    if field is None:
        raise RowRefused(
            "missing-field", f"expected 'prompt', 'messages' or 'conversations'; the row has {listed(row)}"
        )
    asked = columns[field]
    sample = Sample(layouts.prompt_of(asked, field), [])
    # MiniMind's have roles.
    of_factory = field == "conversations" and isinstance(asked, list) and any("from" in turn for turn in asked)
    context = with_whole_tools(context_of(columns, sample), of_factory, [])
    turns = whole_prompt(columns, sample, [])
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or turns[-1].role == "system" or not turns[-1].content.strip():
        raise RowRefused("no-prompt", f"{field!r} asks nothing: expected a user turn with text in it")
    columns.notes(text for turn in sample.prompt for text in (turn.content,))
    return tuple(turns), context


def _reader(columns: Columns, format: str) -> Callable[[Columns], Sample]:
    row = columns.values
    if format != "auto":
        known = FORMATS[format]
        if missing := sorted(known.fields - row.keys()):
            raise RowRefused("missing-field", f"format {format} needs {listed(missing)}; the row has {listed(row)}")
        return known.read
    # An empty column is no sign of a form, but where nothing else fits (a prompt may be empty).
    filled = {name: value for name, value in row.items() if not is_empty(value)}
    for there in (filled, row):
        for known in FORMATS.values():
            if known.fields <= there.keys() and known.fits(there):
                return known.read
    raise _unknown(columns.row)


def _unknown(row: Row) -> RowRefused:
    """The refusal of a row that no form fits."""
    if "chosen" in row and "rejected" in row:
        if row["rejected"] is None:
            return RowRefused("wrong-type", "'rejected' must be text or a list of turns, got null")
        if isinstance(row["chosen"], str):
            return RowRefused(
                "missing-field",
                f"chosen and rejected are strings, and there is no 'prompt'; the row has {listed(row)}; name its prompt: "
                "--columns prompt=COLUMN",
            )
        return RowRefused("wrong-type", f"'chosen' must be text or a list of turns, got {kind_of(row['chosen'])}")
    if "response" in row or "completion" in row:
        return RowRefused(
            "missing-field",
            f"a row with one answer, and a pair needs two; the row has {listed(row)}; expected a file of preferences "
            "(HelpSteer2 has one, preference/preference.jsonl.gz)",
        )
    name, known = max(FORMATS.items(), key=lambda item: len(item[1].fields & row.keys()) / len(item[1].fields))
    if missing := sorted(known.fields - row.keys()) if known.fields & row.keys() else []:
        return RowRefused(
            "missing-field",
            f"a pair needs a prompt and both answers; the row has {listed(row)}, and the nearest form, {name}, also needs "
            f"{listed(missing)}; other names: --columns prompt=…,chosen=…,rejected=…",
        )
    return RowRefused(
        "unknown-format",
        f"no known form has the columns {listed(row)}; name them: --columns prompt=…,chosen=…,rejected=…",
    )
