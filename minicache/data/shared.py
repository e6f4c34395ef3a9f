"""What the rows of all forms share: system text, earlier turns, tools, template arguments; from prompt and answers to a pair."""

import json
from collections.abc import Iterator
from dataclasses import replace

from minicache.data import layouts
from minicache.data.arguments import NO_ARGUMENTS
from minicache.data.columns import Columns
from minicache.data.layouts import Sample
from minicache.data.records import NO_CONTEXT, Context, Note, Pair, Turn
from minicache.data.turns import json_list, kind_of, require_sound, text_of, turns_of
from minicache.errors import RowRefused

# Columns with the text of a system turn; the first one that is there.
SYSTEMS = ("system", "system_prompt", "system_message")


def context_of(columns: Columns, sample: Sample) -> Context:
    """Tools, documents and template arguments of a row."""
    tools, documents = columns.left("tools"), columns.left("documents")
    # MiniMind's system turns hold the tools.
    turns = [*sample.prompt, *(turn for sides in sample.pairs for side in sides for turn in side)]
    in_turns = [turn.more["tools"] for turn in turns if turn.more and "tools" in turn.more]
    arguments = columns.left("chat_template_kwargs")
    if tools is documents is arguments is None and not in_turns:
        return NO_CONTEXT
    if isinstance(arguments, str):
        arguments = next(iter(json_list(arguments, "chat_template_kwargs")), None)
    if arguments is not None and not isinstance(arguments, dict):
        raise RowRefused("wrong-type", f"'chat_template_kwargs' must be an object, got {kind_of(arguments)}")
    for name in arguments or ():
        if name in NO_ARGUMENTS and name != "tools":
            raise RowRefused("wrong-type", f"'chat_template_kwargs': {name!r} is no argument of a chat template")
    require_sound(arguments)
    given = [
        json_list(each, "tools") for each in ((arguments or {}).get("tools"), tools, *in_turns) if each is not None
    ]
    if any(each != given[0] for each in given):
        raise RowRefused(
            "unused-field", "'tools' stands in several places, and they differ; expected --ignore-fields tools"
        )
    return Context(
        tools=next(iter(given), None),
        documents=None if documents is None else json_list(documents, "documents"),
        arguments={name: value for name, value in (arguments or {}).items() if name != "tools"},
    )


def whole_prompt(columns: Columns, sample: Sample, notes: list[Note]) -> list[Turn]:
    """The prompt of a row with its system text and its earlier turns."""
    prompt = sample.prompt
    if (history := columns.left("history")) is not None:
        prompt = [*layouts.history_of(history), *prompt]
    name = columns.first(*(each for each in SYSTEMS if each in columns.unread))
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


def pair_of(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> Pair:
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


def texts_of(pairs: list[Pair], context: Context) -> Iterator[str]:
    """All texts that the pairs of a row hold."""
    for pair in pairs:
        for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
            yield turn.content
    for value in (context.tools, context.documents):
        if value:
            yield json.dumps(value, ensure_ascii=False)
