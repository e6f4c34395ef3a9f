"""What the rows of all forms share: system text, earlier turns, tools, template arguments; from prompt and answers to a pair."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minicache.data import layouts
from minicache.data.arguments import LISTS, NO_ARGUMENTS
from minicache.data.columns import Columns
from minicache.data.layouts import Sample
from minicache.data.parts import is_bare
from minicache.data.records import NO_CONTEXT, Context, Note, Pair, Turn
from minicache.data.turns import turns_of
from minicache.data.values import json_list, kind_of, require_sound, text_of
from minicache.errors import RowRefused

# Columns with the text of a system turn; the first one that is there.
SYSTEMS = ("system", "system_prompt", "system_message")


def context_of(columns: Columns, sample: Sample) -> Context:
    """Tools, documents and template arguments of a row."""
    found = {name: [columns.left(name)] for name in LISTS}
    # MiniMind's system turns hold the tools.
    turns = [*sample.prompt, *(turn for sides in sample.pairs for side in sides for turn in side)]
    found["tools"] += [turn.more["tools"] for turn in turns if turn.more and "tools" in turn.more]
    arguments = columns.left("chat_template_kwargs")
    if arguments is None and all(each is None for values in found.values() for each in values):
        return NO_CONTEXT
    if isinstance(arguments, str):
        arguments = next(iter(json_list(arguments, "chat_template_kwargs")), None)
    if arguments is not None and not isinstance(arguments, dict):
        raise RowRefused("wrong-type", f"'chat_template_kwargs' must be an object, got {kind_of(arguments)}")
    for name in arguments or ():
        if name in NO_ARGUMENTS and name not in LISTS:
            raise RowRefused("wrong-type", f"'chat_template_kwargs': {name!r} is no argument of a chat template")
    require_sound(arguments)
    lists = {name: _one_of([*values, (arguments or {}).get(name)], name) for name, values in found.items()}
    return Context(**lists, arguments={name: each for name, each in (arguments or {}).items() if name not in LISTS})


def with_whole_tools(context: Context, wrap: bool, notes: list[Note]) -> Context:
    """The context with {type, function} around bare tools, which most templates look for, or a note on those that stay bare.

    wrap: the row is of LLaMA-Factory, which puts it around them (data/tool_utils.py); TRL and MiniMind do not.
    """
    tools = context.tools or []
    if not any(map(is_bare, tools)):
        return context
    if not wrap:
        notes.append(Note("bare-tools"))
        return context
    whole = [{"type": "function", "function": tool} if is_bare(tool) else tool for tool in tools]
    return replace(context, tools=whole)


def _one_of(values: list[object], name: str) -> list[Any] | None:
    """The list that a row has in one place or several, None for an empty one. Raises RowRefused: the places differ."""
    given = [each for each in (json_list(value, name) for value in values) if each]
    if any(each != given[0] for each in given):
        raise RowRefused(
            "unused-field", f"{name!r} stands in several places, and they differ; expected --ignore-fields {name}"
        )
    return given[0] if given else None


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
