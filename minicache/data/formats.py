"""Rows of preference files -> `Pair`s: one function for each form of a row.

The form of a row is the first in `FORMATS` that fits it, unless the user names one. A function reads the columns of its form; what
all forms share (system text, earlier turns, tools, template arguments) is read here, and so is what becomes of other columns.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from minicache.data import layouts, lists, votes
from minicache.data.columns import Columns, Reading, Row, with_reading
from minicache.data.layouts import Sample
from minicache.data.ranking import pairs_of
from minicache.data.records import NO_CONTEXT, Context, Note, Pair, Turn
from minicache.data.template import NO_ARGUMENTS
from minicache.data.turns import json_list, kind_of, listed, text_of, turns_of
from minicache.errors import RowRefused

AUTO = Reading()
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
    "sharegpt": Format({"conversations", "chosen", "rejected"}, layouts.from_sharegpt, layouts.has_turns),
    "stack-exchange": Format({"question", "response_j", "response_k"}, layouts.from_stack_exchange),
    "ultrainteract": Format({"trajectory", "chosen", "rejected"}, layouts.from_trajectory),
    "math-step": Format({"prompt", "initial_reason_steps", "chosen", "rejected"}, layouts.from_steps),
    "messages": Format({"chosen", "rejected"}, layouts.from_messages, layouts.has_turns),
    "prompt": Format({"prompt", "chosen", "rejected"}, layouts.from_prompt, layouts.has_texts),
    "hh": Format({"chosen", "rejected"}, layouts.from_transcript, layouts.is_transcript),
    "alpaca": Format({"instruction", "chosen", "rejected"}, layouts.from_alpaca, layouts.has_texts),
    "orca": Format({"question", "chosen", "rejected"}, layouts.from_question, layouts.has_texts),
    "input": Format({"input", "chosen", "rejected"}, layouts.from_input, layouts.has_texts),
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
    "nectar": Format({"prompt", "answers"}, lists.from_ranks, lists.has_objects("answers", "rank")),
    "answers": Format({"question", "answers"}, lists.from_posts),
    "ultrafeedback": Format({"instruction", "completions"}, lists.from_completions),
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
    if reading.columns or reading.ignore_fields:
        row = with_reading(row, reading)
    columns = Columns(row)
    sample = _reader(columns, reading.format)(columns)
    context = _context(columns, sample)
    notes = [*sample.notes]
    prompt = _prompt_of(columns, sample, notes)
    if sample.answers is not None:
        made, ties = pairs_of(sample.answers, reading.pairs)
        sample, notes = sample._replace(pairs=made), notes + ties
    pairs = [_pair(prompt, chosen, rejected) for chosen, rejected in sample.pairs]
    if columns.unread:
        notes += columns.notes(_texts(pairs, context))
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
    columns = Columns(with_reading(row, reading))
    field = next((name for name in ("messages", "conversations", "prompt") if name in columns), None)
    if field is None:
        raise RowRefused(
            "missing-field", f"expected 'prompt', 'messages' or 'conversations'; the row has {listed(row)}"
        )
    sample = Sample(layouts.prompt_of(columns[field], field), [])
    context = _context(columns, sample)
    turns = _prompt_of(columns, sample, [])
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
    # An empty column, such as `prompt`, does not make the row another form's where another one fits.
    for names in ({name for name, value in row.items() if value not in ("", [], {})}, row.keys()):
        for known in FORMATS.values():
            if known.fields <= names and known.fits(row):
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
    if any(known.fields & row.keys() for known in FORMATS.values()):
        return RowRefused("missing-field", f"a pair needs both answers; the row has {listed(row)}")
    return RowRefused(
        "unknown-format",
        f"no known form has the columns {listed(row)}; name them: --columns prompt=…,chosen=…,rejected=… "
        f"(forms: {', '.join(FORMATS)})",
    )


# --- what all forms share ---


def _context(columns: Columns, sample: Sample) -> Context:
    """Tools, documents and template arguments of a row."""
    tools, functions, documents = (columns.left(name) for name in ("tools", "functions", "documents"))
    # MiniMind's system turns hold the tools.
    turns = [*sample.prompt, *(sample.pairs[0][0] if sample.pairs else ())]
    in_turn = next((turn.more["tools"] for turn in reversed(turns) if turn.more and "tools" in turn.more), None)
    arguments = columns.left("chat_template_kwargs")
    if tools is functions is in_turn is documents is arguments is None:
        return NO_CONTEXT
    if isinstance(arguments, str):
        arguments = next(iter(json_list(arguments, "chat_template_kwargs")), None)
    if arguments is not None and not isinstance(arguments, dict):
        raise RowRefused("wrong-type", f"'chat_template_kwargs' must be an object, got {kind_of(arguments)}")
    for name in arguments or ():
        if name in NO_ARGUMENTS and name != "tools":
            raise RowRefused("wrong-type", f"'chat_template_kwargs': {name!r} is no argument of a chat template")
    places = {"chat_template_kwargs": (arguments or {}).get("tools"), "tools": tools, "functions": functions}
    given = [json_list(each, name) for name, each in [*places.items(), ("tools", in_turn)] if each is not None]
    if any(each != given[0] for each in given):
        raise RowRefused(
            "unused-field", "'tools' stands in several places, and they differ; expected --ignore-fields tools"
        )
    return Context(
        tools=next(iter(given), None),
        documents=None if documents is None else json_list(documents, "documents"),
        arguments={name: value for name, value in (arguments or {}).items() if name != "tools"},
    )


def _prompt_of(columns: Columns, sample: Sample, notes: list[Note]) -> list[Turn]:
    """The prompt of a row with its system text and its earlier turns."""
    prompt = sample.prompt
    if (history := columns.left("history")) is not None:
        prompt = [*layouts.history_of(history), *prompt]
    names = ("system", "system_prompt", "system_message")
    name = next((name for name in names if columns.left(name) is not None), None)
    if name is None:
        return prompt
    system = columns[name]
    own = turns_of(system, name) if isinstance(system, list | dict) else [Turn("system", text_of(system, name))]
    first = prompt or (sample.pairs[0][0] if sample.pairs else [])
    if first and first[0].role == "system":
        # As in LLaMA-Factory (data/converter.py), the conversation's own system turn goes before the column.
        if own != first[:1]:
            notes.append(Note("system-turn"))
        return prompt
    return [*own, *prompt]


def _pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> Pair:
    """The pair of a prompt and two continuations. An assistant's turn at the prompt's end opens both answers."""
    last = prompt[-1] if prompt else None
    if last is None or last.role != "assistant" or last.says_nothing or (last.more and "tool_calls" in last.more):
        return Pair.from_conversations([*prompt, *chosen], [*prompt, *rejected])
    sides = [_continued(last, side) for side in (chosen, rejected)]
    pair = Pair.from_conversations([*prompt[:-1], *sides[0]], [*prompt[:-1], *sides[1]])
    return replace(pair, opening=last.content) if len(pair.prompt) == len(prompt) - 1 else pair


def _continued(opening: Turn, side: list[Turn]) -> list[Turn]:
    if not side or side[0].role != "assistant":
        return [opening, *side]
    more = {**(opening.more or {}), **(side[0].more or {})} or None
    return [Turn("assistant", opening.content + side[0].content, more), *side[1:]]


def _texts(pairs: list[Pair], context: Context) -> Iterator[str]:
    """All texts that the pairs of a row hold."""
    for pair in pairs:
        for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
            yield turn.content
    for value in (context.tools, context.documents):
        if value:
            yield json.dumps(value, ensure_ascii=False)
