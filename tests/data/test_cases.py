"""Rows as people hold them, from beside the checkout (shared/cases): the text of each side, what counts, or why it is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minicache.data.encode import Encoded, Encoder
from minicache.data.formats import to_pairs
from minicache.data.spans import Side
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from tests.conftest import Original, Row

# SmolLM2's: ChatML with a system text of its own.
SMOL = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant"
    " named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Cases with a due text.
DUE = [
    "k01-system-column/orca-question",
    "k01-system-column/prompt-list-system-list",
    "k01-system-column/prompt",
    "k01-system-column/sharegpt-column-and-turn",
    "k02-tools-column/json-string",
    "k02-tools-column/objects",
    "k03-tool-calls/answer-is-call-empty",
    "k03-tool-calls/answer-is-call-with-text",
    "k03-tool-calls/call-in-context",
    "k03-tool-calls/sharegpt-function-call",
    "k04-reasoning-content/answers",
    "k04-reasoning-content/differ-only-in-thoughts",
    "k05-template-kwargs-documents/chat-template-kwargs",
    "k07-other-context-columns/history",
    "k10-content-parts/text-parts",
]
# Case, template, reason of the refusal, and a word of its message.
REFUSED = [
    ("k02-tools-column/json-string", "smol", "unused-field", "tools"),
    ("k02-tools-column/objects", "smol", "unused-field", "tools"),
    ("k03-tool-calls/answer-is-call-empty", "smol", "template", "a call is missing"),
    ("k03-tool-calls/answer-is-call-with-text", "smol", "template", "a call is missing"),
    ("k03-tool-calls/answer-is-call-with-text", "llama3", "template", "its text is missing"),
    ("k03-tool-calls/call-in-context", "smol", "template", "a call is missing"),
    ("k03-tool-calls/call-in-context", "phi4", "template", "a call is missing"),
    ("k04-reasoning-content/answers", "smol", "unused-field", "reasoning_content"),
    ("k04-reasoning-content/differ-only-in-thoughts", "smol", "unused-field", "reasoning_content"),
    ("k06-images/trl", "mm3", "media", "images"),
    ("k07-other-context-columns/prompt-beside-instruction-input", "mm3", "unused-field", "'input'"),
    ("k07-other-context-columns/prompt-text-not-in-the-sides", "mm3", "prompts-differ", "'prompt'"),
    ("k08-template-drops-content/r1-thoughts", "deepseek_r1", "template", "a thought is missing"),
]


@pytest.fixture
def named(original: Original) -> dict[str, ChatTokenizer]:
    """Name -> MiniMind 3's tokenizer with the template of that name."""
    mm3 = ChatTokenizer.load(original("fixtures/minimind/minimind3-tokenizer"))
    found = {"mm3": mm3, "smol": replace(mm3, template=SMOL)}
    for file in original("cases/templates").glob("*.jinja"):
        found[file.stem] = replace(mm3, template=file.read_text(encoding="utf-8"))
    found["qwen"] = found["qwen25"]
    special = {**mm3.special, "bos_token": "<|begin_of_text|>"}
    found["llama3"] = replace(found["llama31"], date="2026-11-25", special=special)
    return found


def rows_of(original: Original, case: str) -> list[Row]:
    lines = original(f"cases/{case}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def expected_of(original: Original, case: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(original(f"cases/{case}.expected.json").read_text(encoding="utf-8"))
    return content


def encoded(tokenizer: ChatTokenizer, row: Row, **options: Any) -> tuple[Encoded, list[str]]:
    """The encoded pair, and the text of each side with the counted parts between « and »."""
    (pair,), encoder = to_pairs(row, "f", 1), Encoder(tokenizer, 2048, **options)
    return encoder.encode(pair), [shown(side) for side in encoder._renderer.render(pair)[0]]


def shown(side: Side) -> str:
    text = side.text
    for begin, end in reversed(side.spans):
        text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
    return text


@pytest.mark.parametrize("case", DUE)
def test_a_row_comes_out_as_due(original: Original, named: dict[str, ChatTokenizer], case: str) -> None:
    (row,), expected = rows_of(original, case), expected_of(original, case)
    for name in expected.keys() - {"verdict"}:
        result, texts = encoded(named[name], row)
        for number, side in enumerate(("chosen", "rejected")):
            due = expected[name][side]
            assert texts[number] == due["text"], name
            # The other tokenizers are not beside the checkout.
            if name == "mm3":
                ids, mask = result.pair.side(number)
                assert (len(ids), int(mask.sum())) == (due["tokens"], due["counted"])


@pytest.mark.parametrize(("case", "name", "reason", "words"), REFUSED)
def test_a_row_that_cannot_be_used_whole_is_refused_by_name(
    original: Original, named: dict[str, ChatTokenizer], case: str, name: str, reason: str, words: str
) -> None:
    (row,) = rows_of(original, case)
    for loss_on in ("response", "answer", "assistant"):
        with pytest.raises(RowRefused) as refused:
            encoded(named[name], row, loss_on=loss_on)
        assert refused.value.reason == reason and words in str(refused.value)


def test_rows_that_differ_in_their_system_text_alone_are_three_pairs(
    original: Original, named: dict[str, ChatTokenizer]
) -> None:
    rows = rows_of(original, "k01-system-column/three-rows-differ-only-in-system")
    for name in ("mm3", "smol", "qwen", "llama3"):
        assert len({encoded(named[name], row)[0].pair.digest for row in rows}) == 3


def test_templates_that_ask_for_the_date_get_a_fixed_one(original: Original, named: dict[str, ChatTokenizer]) -> None:
    (row,) = rows_of(original, "k09-strftime-now/any-row")
    for name in ("mistral_small", "gptoss"):
        assert "2024-07-26" in encoded(named[name], row)[1][0]
        assert "2026-11-25" in encoded(replace(named[name], date="2026-11-25"), row)[1][0]


def test_an_answer_goes_on_where_the_prompt_ends(original: Original, named: dict[str, ChatTokenizer]) -> None:
    (row,) = rows_of(original, "k11-prefilled-assistant/prompt-ends-in-assistant")
    for loss_on in ("response", "answer"):
        _, texts = encoded(named["smol"], row, loss_on=loss_on)
        assert texts[0].endswith("<|im_start|>assistant\nThe answer is« yes<|im_end|>\n»")
        assert texts[1].endswith("<|im_start|>assistant\nThe answer is« no<|im_end|>\n»")


def test_contents_that_are_rendered_already_are_counted(original: Original, named: dict[str, ChatTokenizer]) -> None:
    (row,) = rows_of(original, "k12-rendered-twice/pre-rendered-chatml")
    result, _ = encoded(named["smol"], row)
    assert ("special-text", "<|im_start|>") in [tuple(note) for note in result.notes]


def test_trls_recipe_for_plain_text(original: Original, named: dict[str, ChatTokenizer]) -> None:
    case = "k12-rendered-twice/trl-plain-text-recipe"
    (row,), due = rows_of(original, case), expected_of(original, case)["smol"]["chosen"]
    result, texts = encoded(named["plain_trl"], row, special_text="allow")
    assert texts[0] == due["text"] and int(result.pair.side(0)[1].sum()) == due["counted"]


def test_the_words_of_a_user_between_answers_do_not_count(original: Original, named: dict[str, ChatTokenizer]) -> None:
    (row,) = rows_of(original, "k13-user-turns-inside-answers/two-turn-answers")
    for name in ("smol", "qwen"):
        _, texts = encoded(named[name], row, loss_on="answer")
        closed, opened = "<|im_end|>\n»", "<|im_start|>assistant\n«"
        assert texts[0].endswith(f"{opened}a{closed}<|im_start|>user\nmore<|im_end|>\n{opened}c{closed}")
        assert texts[1].endswith(f"{opened}b{closed}<|im_start|>user\nless<|im_end|>\n{opened}d{closed}")


def test_every_case_is_tested(original: Original) -> None:
    folder, text = original("cases"), Path(__file__).read_text(encoding="utf-8")
    missing = [file for file in folder.glob("k*/*.jsonl") if str(file.relative_to(folder).with_suffix("")) not in text]
    assert not missing
