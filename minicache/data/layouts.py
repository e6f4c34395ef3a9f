"""Forms of preference rows: one function for each, from the columns of a row to its prompt and answers."""

import re
from dataclasses import replace
from typing import NamedTuple

from minicache.data.columns import Columns, Row
from minicache.data.ranking import Answer, Sides
from minicache.data.records import Note, Turn
from minicache.data.turns import turns_of
from minicache.data.values import kind_of, text_of
from minicache.errors import RowRefused

SIDES = ("chosen", "rejected")
# The columns with the prompt of answers that are turns.
PROMPTS = ("prompt", "messages", "conversations", "conversation")
PROMPTERS = ("<|prompter|>", "prompter: ")
OASST_LINE = re.compile(r"^(prompter|assistant): ", re.MULTILINE)
OASST_TURN = re.compile(r"<\|(prompter|assistant)\|>")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Sample(NamedTuple):
    """What a row says.

    prompt: [] where the sides repeat it. pairs: the turns that follow it, chosen and rejected. answers: several to make pairs of.
    notes: what else is to be counted.
    """

    prompt: list[Turn]
    pairs: list[Sides]
    answers: list[Answer] | None = None
    notes: tuple[Note, ...] = ()


# --- tests of a row ---


def has_dialogue(row: Row) -> bool:
    return isinstance(row["conversations"], list)


def has_turns(row: Row) -> bool:
    return isinstance(row["chosen"], list | dict)


def has_texts(row: Row) -> bool:
    return isinstance(row["chosen"], str)


def is_transcript(row: Row) -> bool:
    return isinstance(row["chosen"], str) and row["chosen"].startswith("\n\nHuman:")


def has_transcript(row: Row) -> bool:
    """Whether the prompt is a transcript and the answers are texts."""
    prompt, is_text = row["prompt"], isinstance(row["chosen"], str)
    return is_text and isinstance(prompt, str) and (_ends_open(prompt) or prompt.startswith(PROMPTERS))


def has_rejection(row: Row) -> bool:
    return "rejected_response" in row or "rejected_messages" in row


# --- one function for each form ---


def from_messages(columns: Columns) -> Sample:
    """`chosen` and `rejected` are turns {role, content}; the prompt stands in both, or in a column (MiniMind, TRL, axolotl)."""
    chosen, rejected = (turns_of(columns[side], side) for side in ("chosen", "rejected"))
    if not chosen or not rejected:
        raise RowRefused("empty-answer", "a side has no turns")
    name = columns.first(*PROMPTS)
    if name is None:
        return Sample([], [(chosen, rejected)])
    if all(side[0].role == "assistant" for side in (chosen, rejected)):
        return _joined(prompt_of(columns[name], name), (chosen, rejected), name)
    if name == "prompt":
        _require_same_prompt(columns[name], chosen, rejected)
    return Sample([], [(chosen, rejected)])


def _require_same_prompt(prompt: object, chosen: list[Turn], rejected: list[Turn]) -> None:
    """Raises RowRefused: the prompt of a row is not the one that its sides repeat."""
    if isinstance(prompt, list | dict):
        turns = turns_of(prompt, "prompt")
        is_same = all(side[: len(turns)] == turns for side in (chosen, rejected))
    else:
        text = text_of(prompt, "prompt").strip()
        shared = [one for one, other in zip(chosen, rejected, strict=False) if one == other and one.role != "system"]
        # A text that is one of the turns, or a rendering of all of them.
        is_same = any(text in turn.content for turn in chosen) or all(turn.content.strip() in text for turn in shared)
    if not is_same:
        raise RowRefused("prompts-differ", "each side repeats a prompt, and that prompt does not begin with 'prompt'")


def from_prompt(columns: Columns) -> Sample:
    """`prompt`, `chosen`, `rejected` strings (TRL); the prompt may also be a list of {role, content}."""
    return _answered(columns, "prompt", "chosen", "rejected")


def from_prompt_transcript(columns: Columns) -> Sample:
    r"""`prompt` is a transcript: "\n\nHuman: … \n\nAssistant:" (Dahoas), or OpenAssistant's. Turns are stripped."""
    one, other = ([replace(turn, content=turn.content.strip()) for turn in side] for side in _texts_of(columns, *SIDES))
    return Sample(transcribed(columns["prompt"], "prompt"), [(one, other)])


def from_messages_and_texts(columns: Columns) -> Sample:
    """`messages` are the prompt of the texts `chosen` and `rejected` (axolotl)."""
    return _answered(columns, "messages", *SIDES)


def from_response_names(columns: Columns) -> Sample:
    """`question`, `response_chosen`, `response_rejected`, also `system`, `history` (shibing624/DPO-En-Zh-20k-Preference)."""
    return _answered(columns, "question", "response_chosen", "response_rejected")


def from_question(columns: Columns) -> Sample:
    """`question`, `chosen`, `rejected`, and `system` (Intel/orca_dpo_pairs)."""
    return _answered(columns, "question", "chosen", "rejected")


def from_stack_exchange(columns: Columns) -> Sample:
    """`question`, `response_j` (preferred), `response_k` (lvwerra/stack-exchange-paired)."""
    return _answered(columns, "question", "response_j", "response_k")


def from_alpaca(columns: Columns) -> Sample:
    """`instruction`, `input`, `chosen`, `rejected`; also `system`, `history` (LLaMA-Factory, data/converter.py)."""
    return Sample(instruction_of(columns), [_texts_of(columns, "chosen", "rejected")])


def from_responses(columns: Columns) -> Sample:
    """`chosen_response`, `rejected_response` to an `instruction` or `prompt` (argilla)."""
    name = "instruction" if columns.values.get("instruction") else "prompt"
    return _answered(columns, name, "chosen_response", "rejected_response")


def from_input(columns: Columns) -> Sample:
    """`input`, `chosen`, `rejected`, and `system` (argilla/distilabel-intel-orca-dpo-pairs, whose `status` may be a tie)."""
    if columns.values.get("status") == "tie":
        raise RowRefused("tie", "neither answer is preferred, by 'status'")
    return _answered(columns, "input", "chosen", "rejected")


def from_trajectory(columns: Columns) -> Sample:
    """`trajectory` are {from, value} up to the answers `chosen` and `rejected`, which are texts (UltraInteract)."""
    return Sample(turns_of(columns["trajectory"], "trajectory"), [_texts_of(columns, "chosen", "rejected")])


def from_steps(columns: Columns) -> Sample:
    """`initial_reason_steps` open both answers, `chosen` and `rejected` go on from there (Math-Step-DPO)."""
    steps = columns.get("initial_reason_steps")
    opening = [] if steps is None else [Turn("assistant", text_of(steps, "initial_reason_steps"))]
    return Sample([*prompt_of(columns["prompt"], "prompt"), *opening], [_texts_of(columns, "chosen", "rejected")])


def from_sharegpt(columns: Columns) -> Sample:
    """`conversations` are {from, value}; `chosen` and `rejected` are one such turn or a list of them (LLaMA-Factory), or texts."""
    chosen, rejected = (answer_of(columns[side], side) for side in SIDES)
    return _joined(turns_of(columns["conversations"], "conversations"), (chosen, rejected), "conversations")


def from_swift(columns: Columns) -> Sample:
    """`messages` end in the preferred answer; `rejected_response` is the other one, `rejected_messages` all turns (ms-swift)."""
    turns = turns_of(columns["messages"], "messages")
    if not turns or turns[-1].role != "assistant":
        raise RowRefused("empty-answer", "'messages' do not end in an answer")
    # All that follows the last user's turn is the answer, calls and their results among it.
    asked = max((at for at, turn in enumerate(turns, start=1) if turn.role == "user"), default=0)
    if "rejected_messages" in columns:
        others = turns_of(columns["rejected_messages"], "rejected_messages")
        return Sample([], [(turns, others if others[:1] == turns[:1] else turns[:asked] + others)])
    other = columns["rejected_response"]
    return Sample(turns[:asked], [(turns[asked:], answer_of(other, "rejected_response"))])


def from_transcript(columns: Columns) -> Sample:
    r"""`chosen` and `rejected` are transcripts "\n\nHuman: … \n\nAssistant: …" (Anthropic HH). Turns are stripped."""
    chosen, rejected = (_transcript(columns[side], side) for side in ("chosen", "rejected"))
    return Sample([], [(chosen, rejected)])


# --- what the forms share ---


def prompt_of(value: object, field: str) -> list[Turn]:
    """The turns of a prompt: a list of turns, or a text that the user says."""
    return turns_of(value, field) if isinstance(value, list | dict) else [Turn("user", text_of(value, field))]


def transcribed(value: object, field: str) -> list[Turn]:
    """As `prompt_of`; a text may be a transcript that ends where the assistant speaks."""
    if isinstance(value, str) and _ends_open(value):
        return _transcript(value, field)[:-1]
    if isinstance(value, str) and value.startswith(PROMPTERS):
        return _tagged(value.removesuffix("<|assistant|>"), field)
    return prompt_of(value, field)


def _ends_open(text: str) -> bool:
    return text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:")


def instruction_of(columns: Columns) -> list[Turn]:
    """The turn of `instruction` and `input`, as LLaMA-Factory joins them."""
    parts = [text_of(columns[name], name) for name in ("instruction", "input") if columns.get(name)]
    return [Turn("user", "\n".join(parts))]


def history_of(value: object) -> list[Turn]:
    """Earlier turns: [question, answer] each (LLaMA-Factory), or turns."""
    if isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value):
        roles = ("user", "assistant")
        return [Turn(role, text_of(text, "history")) for item in value for role, text in zip(roles, item, strict=True)]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return turns_of(value, "history")
    raise RowRefused("wrong-type", f"'history' must be a list of [question, answer] or of turns, got {kind_of(value)}")


def answer_of(value: object, field: str) -> list[Turn]:
    """The turns of an answer: a list of turns, a turn, or a text that the assistant says."""
    return turns_of(value, field) if isinstance(value, list | dict) else [Turn("assistant", text_of(value, field))]


def _joined(prompt: list[Turn], sides: Sides, field: str) -> Sample:
    """The prompt and its answers, with each turn once: sides may repeat the prompt, and it may end in the turns of one of them.

    Raises:
        RowRefused: the sides begin with another prompt.
    """
    shared = max(_overlap(prompt, side) for side in sides)
    asks_again = all(side and side[0].role in ("system", "user") for side in sides)
    if asks_again and not shared and prompt and prompt[-1].role != "assistant":
        raise RowRefused("prompts-differ", f"each side has a prompt of its own, and it does not begin with {field!r}")
    return Sample(prompt[: len(prompt) - shared], [sides])


def _overlap(first: list[Turn], second: list[Turn]) -> int:
    """The number of turns at the end of a prompt that a side begins with: all of it, all but a system turn, the side, one turn."""
    sizes = (len(first), len(first) - 1, len(second), 1)
    return next((size for size in sizes if 0 < size <= len(first) and first[-size:] == second[:size]), 0)


def _answered(columns: Columns, prompt: str, chosen: str, rejected: str) -> Sample:
    return _joined(prompt_of(columns[prompt], prompt), _texts_of(columns, chosen, rejected), prompt)


def _texts_of(columns: Columns, chosen: str, rejected: str) -> Sides:
    one, other = (Turn("assistant", text_of(columns[name], name)) for name in (chosen, rejected))
    return [one], [other]


def _tagged(text: str, field: str) -> list[Turn]:
    """The turns of a text "<|prompter|>…<|endoftext|><|assistant|>…", or "prompter: …", a turn on each line that begins so."""
    parts = (OASST_TURN if text.startswith("<|") else OASST_LINE).split(text)
    turns = [
        Turn("user" if who == "prompter" else "assistant", said.removesuffix("<|endoftext|>").strip())
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if parts[0] or turns[-1].role != "user":
        raise RowRefused("prompts-differ", f"{field!r} ends in the assistant's turn: the answers to it are a user's")
    return turns


def _transcript(value: object, field: str) -> list[Turn]:
    parts = HH_TURN.split(text_of(value, field))
    if parts[0].strip() or len(parts) < 3:
        raise RowRefused("wrong-type", rf"{field!r} does not read '\n\nHuman: …\n\nAssistant: …'")
    return [
        Turn("user" if who == "Human" else "assistant", text.strip())
        for who, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
