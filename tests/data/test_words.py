"""What a template drops is refused or noted, and nothing else is; what counts does not depend on the words that are said."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs
from minicache.data.records import Note
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from tests.conftest import Row
from tests.data.test_hostile import quickly
from tests.data.test_tokenizers import LLAMA3, MISTRAL, with_template
from tests.references.conversations import EMPTY_THINK

# Templates after the published forms, with the parts that matter here. ChatML as Qwen3's: tools, the last thoughts, calls.
CHATML = """{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{% set text, thought = m.content or '', m.reasoning_content or '' %}
{%- if '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ text }}
{%- for c in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# No header before a call, another closing after it, as Mistral's and gpt-oss's.
TERSE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[RESULT] ' + m.content | tojson + '[/RESULT]' }}
{%- elif m.tool_calls %}{{ '[CALLS] ' }}
{%- for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ '[/CALLS]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"""
FIRST_CALL = TERSE.replace("for c in m.tool_calls", "for c in m.tool_calls[:1]")
# The calls of Llama 3.1, whose results are JSON.
HEADED = """{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start|>' + role + '<|end|>\\n\\n' }}
{%- if m.tool_calls %}{{ '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{ '}<|im_end|>' }}
{%- elif m.role == 'tool' %}{{ m.content | tojson }}{{ '<|im_end|>' }}
{%- else %}{{ m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
BUILT = {"chatml": CHATML, "terse": TERSE, "headed": HEADED}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "q"}


def said(content: str | None, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: Any, number: int = 1) -> Row:
    return {"id": f"c0000000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def row_of(prompt: list[Row], *chosen: Row, **columns: Any) -> Row:
    return {"prompt": prompt, "chosen": [*chosen], "rejected": [said("something else")], **columns}


@pytest.fixture(scope="module")
def built(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    place = tmp_path_factory.mktemp("built")
    return {name: with_template(tokenizer_dir, place / name, template) for name, template in BUILT.items()}


def rendered(tokenizer: ChatTokenizer, row: Row, **options: Any) -> tuple[str, list[str], list[Note]]:
    """The chosen side's text, the texts of it that count, and the notes."""
    (pair,), encoder = to_pairs(row, "f", 1), Encoder(tokenizer, 4096, **options)
    side = encoder._renderer.render(pair)[0][0]
    encoded = encoder.encode(pair)
    ids, mask = encoded.pair.side(0)
    parts = [side.text[begin:end] for begin, end in side.spans]
    shown = tokenizer.special_text.show(side.text)
    assert tokenizer.decode(ids) == shown
    assert tokenizer.decode(ids[mask == 1]).strip().endswith(tokenizer.special_text.show(parts[-1]).strip())
    return shown, [tokenizer.special_text.show(part) for part in parts], list(encoded.notes)


def require_refused(tokenizer: ChatTokenizer, row: Row, words: str, **options: Any) -> None:
    with pytest.raises(RowRefused, match=words):
        rendered(tokenizer, row, **options)


# --- dropped, and not noticed by looking for the words ---

SHORT = [
    pytest.param(FIRST_CALL, row_of([ASK], said("", tool_calls=[call("f", {"a": 1}), call("f", {"a": 1}, 2)])), "a call",
                 id="the second of two like calls"),
    pytest.param(HEADED, row_of([ASK], said("", tool_calls=[call("f", {"a": 1}), call("f", {"a": 1}, 2)])), "a call",
                 id="the second of two like calls, by index"),
    pytest.param(HEADED.replace("parameters", "").replace("m.tool_calls[0].function.arguments | tojson", "''"),
                 row_of([ASK], said("", tool_calls=[call("f", {"a": "m"})])), "a call", id="arguments"),
    pytest.param(CHATML.replace("c.function.name", "'look'"),
                 row_of([ASK], said("", tool_calls=[call("look", {})]), tools=[TOOL]), "a call",
                 id="a call's name that stands in the tools"),
    pytest.param("{% for m in messages if m.role != 'tool' %}{{ m.role + m.content }}{% endfor %}",
                 row_of([ASK, said("a"), {"role": "tool", "content": "a"}], said("b")), "the tool says", id="a role"),
    pytest.param(MISTRAL.replace("loop.first and", "loop.last and"), row_of([{"role": "system", "content": "n"}, ASK], said("n")),
                 "the system says", id="a system turn that only a last question writes"),
    pytest.param("{% for m in messages %}{{ m.role + m.content if loop.first or m.role != 'system' }}{% endfor %}",
                 row_of([{"role": "system", "content": "s"}, {"role": "system", "content": "y"}, ASK], said("b")),
                 "the system says", id="a second system turn"),
    pytest.param(LLAMA3, row_of([ASK], said("b"), tools=[TOOL]), "'tools' is not written", id="tools, but for a line"),
    pytest.param(CHATML.replace("tool | tojson", "tool.function.description"), row_of([ASK], said("Look"), tools=[TOOL]),
                 "'tools' is not written", id="the name of a tool"),
    pytest.param(CHATML, row_of([ASK, said("Well <think>\nhm\n</think>\n\na"), ASK], said("b")), "its text is missing: 'Well'",
                 id="text before an earlier thought"),
    pytest.param(CHATML, row_of([ASK], said("<think>a</think>b</think>c")), "a thought is missing", id="one of two thoughts"),
    pytest.param(CHATML, row_of([ASK], said("a", reasoning="hm", reasoning_content="no")), "'reasoning'",
                 id="one of two names of thoughts"),
]  # fmt: skip


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
@pytest.mark.parametrize(("template", "row", "words"), SHORT)
def test_what_a_template_drops_is_seen_however_short_it_is(
    tokenizer_dir: Path, tmp_path: Path, template: str, row: Row, words: str, loss_on: str
) -> None:
    require_refused(with_template(tokenizer_dir, tmp_path, template), row, words, loss_on=loss_on)


def test_a_template_that_demands_something_of_contents_is_probed_turn_by_turn(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('Q') %}{{ raise_exception('Q?') }}"
        "{% endif %}{% if m.role != 'tool' %}{{ m.role + m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tokenizer_dir, tmp_path, template)
    asked = {"role": "user", "content": "Q"}
    rendered(tokenizer, row_of([asked], said("a")))
    require_refused(tokenizer, row_of([asked, said("a"), {"role": "tool", "content": "a"}], said("b")), "the tool says")


# --- written in another form, and so not refused ---


RESULT = {"role": "tool", "content": '"18"\n\té\u2028😀 <b>'}
SPACED = [{"role": "system", "content": "\n s  y \n"}, {"role": "user", "content": "\t<a>&amp;</a> \u3000é\n"}]
ALIKE = [
    (HEADED, row_of([ASK, said("", tool_calls=[call("f", {})]), RESULT], said("b"))),
    (
        HEADED.replace("| tojson", "| tojson(ensure_ascii=true)"),
        row_of([ASK], said("", tool_calls=[call("é", {"x": ["é", "\n"]})])),
    ),
    (
        CHATML,
        row_of([ASK], said("", tool_calls=[call("f", '{"a": [1, 2.5, {"b": null}], "c": true, "d": "\\u00e9"}')])),
    ),
    (LLAMA3, row_of(SPACED, said(" b\n"))),
    (
        "{% for m in messages %}{{ m.role + ' ' + m.content.split() | join(' ') }}{% endfor %}",
        row_of([ASK], said("a \n b\t c")),
    ),
    (CHATML, row_of([ASK], said("a", reasoning="same", reasoning_content="same"))),
    (CHATML, row_of([ASK], said("<think>\n\n</think>\n\na"))),
    (CHATML, row_of([ASK], said("<think> never closed"))),
    (CHATML, row_of([ASK], said("", reasoning_content="hm", tool_calls=[call("f", {})]))),
]


@pytest.mark.parametrize(("template", "row"), ALIKE)
def test_what_is_written_in_another_form_is_not_refused(
    tokenizer_dir: Path, tmp_path: Path, template: str, row: Row
) -> None:
    rendered(with_template(tokenizer_dir, tmp_path, template), row)


def test_a_switch_that_a_template_takes_out_of_a_content_is_no_loss(tokenizer_dir: Path, tmp_path: Path) -> None:
    """SmolLM3 reads "/no_think" in the system turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ 'off: ' ~ ('/no_think' in m.content) }}"
        "{{ m.content.replace('/no_think', '') }}{% else %}{{ m.role + m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(tokenizer_dir, tmp_path, template)
    system = {"role": "system", "content": "Be brief. /no_think Now."}
    assert "off: TrueBe brief.  Now." in rendered(tokenizer, row_of([system, ASK], said("a")))[0]
    dropping = with_template(tokenizer_dir, tmp_path, template.replace("m.content.replace", "m.content[4:].replace"))
    require_refused(dropping, row_of([system, ASK], said("a")), "the system says")


# --- --think drop ---


def test_dropping_empty_thoughts_hides_nothing_else(
    built: dict[str, ChatTokenizer], tokenizer_dir: Path, tmp_path: Path
) -> None:
    deaf = with_template(tokenizer_dir, tmp_path, CHATML.replace("if tools", "if false"))
    for think in ("keep", "drop"):
        require_refused(deaf, row_of([ASK], said("a"), tools=[TOOL]), "'tools' is not written", think=think)
        notes = rendered(built["chatml"], row_of([{**ASK, "name": "Ann"}], said("a")), think=think)[2]
        assert notes == [Note("unused", "name of a turn")]


def test_an_empty_thought_that_a_user_typed_goes_too(built: dict[str, ChatTokenizer]) -> None:
    """As in MiniMind, which removes them from the rendered text."""
    row = row_of([{"role": "user", "content": f"q {EMPTY_THINK} x"}], said("a"))
    whole, _, _ = rendered(built["chatml"], row)
    assert rendered(built["chatml"], row, think="drop")[0] == whole.replace(EMPTY_THINK, "")


# --- keys ---


def test_keys_of_turns_and_calls_and_documents_are_listed(
    built: dict[str, ChatTokenizer], tokenizer_dir: Path, tmp_path: Path
) -> None:
    prompt = [
        ASK,
        said("", tool_calls=[call("f", {})]),
        {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"},
    ]
    notes = rendered(built["chatml"], row_of(prompt, said("a")))[2]
    assert {note.detail for note in notes} == {"id of a call", "tool_call_id of a turn", "name of a turn"}
    naming = with_template(
        tokenizer_dir, tmp_path, CHATML.replace("+ m.content + '\\n</tool", "+ m.name + m.content + '\\n</tool")
    )
    notes = rendered(naming, row_of(prompt, said("a")))[2]
    assert {note.detail for note in notes} == {"id of a call", "tool_call_id of a turn"}
    reading = "{% for d in documents or [] %}{{ d.title + d.text }}{% endfor %}" + CHATML
    documents = [{"title": "t", "text": "x", "doc_id": "7"}]
    (tmp_path / "d").mkdir()
    notes = rendered(
        with_template(tokenizer_dir, tmp_path / "d", reading), row_of([ASK], said("a"), documents=documents)
    )[2]
    assert notes == [Note("unused", "doc_id of a document")]
    require_refused(built["chatml"], row_of([ASK], said("a"), documents=documents), "'documents' is not written")


def test_tools_of_a_turn_are_the_rows_or_refused(built: dict[str, ChatTokenizer]) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    system = {"role": "system", "content": "s", "tools": json.dumps([TOOL])}
    text, _, notes = rendered(built["chatml"], row_of([system, ASK], said("a")))
    assert '"look"' in text and not notes
    assert rendered(built["chatml"], row_of([system, ASK], said("a"), tools=[TOOL]))[0] == text
    for row in (
        row_of([system, ASK], said("a"), tools=[other]),
        row_of([system, {**ASK, "tools": [other]}], said("a")),
        {**row_of([system, ASK], said("a")), "rejected": [said("b", tools=[other])]},
    ):
        require_refused(built["chatml"], row, "'tools'")


def test_a_turn_that_says_two_things_is_refused(built: dict[str, ChatTokenizer]) -> None:
    twice: list[tuple[Row, str]] = [
        ({"from": "human", "role": "system", "value": "q"}, "'from' and 'role'"),
        ({"from": "human", "role": ["user"], "value": "q"}, "'from' and 'role'"),
        ({"role": "user", "content": "q", "text": "other"}, "'content' and 'text'"),
    ]
    for turn, keys in twice:
        require_refused(built["chatml"], row_of([turn], said("a")), keys)
    expected = rendered(built["chatml"], row_of([ASK], said("a")))
    once: list[Row] = [
        {"from": "human", "role": "user", "value": "q"},
        {"role": "user", "content": None, "value": "q"},
        {"role": "user", "content": "", "text": "q"},
        {"role": "user", "content": "q", "text": "q"},
    ]
    for turn in once:
        assert rendered(built["chatml"], row_of([turn], said("a"))) == expected


# --- special tokens' text ---

TYPED = 'x<|im_end|>\n"é\u2028<|im_start|>y'
TYPED_CALL = call("f<|im_end|>", {"k<|im_end|>": TYPED, "n": [1, {"z": TYPED}]})
TYPED_ROW = row_of(
    [ASK, said("", tool_calls=[TYPED_CALL]), {"role": "tool", "content": TYPED}],
    said("", tool_calls=[call("f", json.dumps({"k": TYPED}))]),
)


@pytest.mark.parametrize("name", BUILT)
def test_typed_special_tokens_in_calls_and_results_are_text(built: dict[str, ChatTokenizer], name: str) -> None:
    tokenizer = built[name]
    row = TYPED_ROW if name != "chatml" else {**TYPED_ROW, "tools": [{**TOOL, "function": {"name": TYPED}}]}
    text, counted, notes = rendered(tokenizer, row)
    (pair,) = to_pairs(row, "f", 1)
    assert text == tokenizer.render(pair.prompt + pair.chosen, context=pair.context)
    harmless = json.loads(json.dumps(row).replace("<|im_end|>", "").replace("<|im_start|>", ""))
    added, specials = tokenizer.backend.get_added_tokens_decoder(), []
    for each in (row, harmless):
        ids, _ = Encoder(tokenizer, 4096).encode(to_pairs(each, "f", 1)[0]).pair.side(0)
        specials.append(sum(token in added for token in ids.tolist()))
    assert specials[0] == specials[1] and Note("special-text", "<|im_end|>") in notes
    assert rendered(tokenizer, row, special_text="allow")[:2] == (text, counted)
    require_refused(tokenizer, row, "holds '<\\|im_", special_text="refuse")


def test_typed_special_tokens_that_a_template_escapes_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer_dir, tmp_path, HEADED.replace("| tojson", "| tojson(ensure_ascii=true)"))
    require_refused(tokenizer, TYPED_ROW, "the chat template escapes")
    rendered(tokenizer, TYPED_ROW, special_text="allow")


def test_a_refusal_shows_what_was_typed(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = with_template(
        tokenizer_dir, tmp_path, "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    )
    row = row_of([ASK, said("a"), {"role": "tool", "content": "r<|im_end|>"}], said("b"))
    require_refused(tokenizer, row, r"missing: 'r<\|im_end\|>'")


# --- what counts ---

WORDS = ["a", "s", "m", "n", "user", "assistant", "think", "name", "arguments", "INST", "tool_call", "end", "1"]
KINDS = st.lists(st.sampled_from(["ask", "say", "call", "call and say", "result"]), max_size=5)


def talk(kinds: list[str], words: list[str]) -> list[Row]:
    turns, rest = [{"role": "user", "content": words[0]}], iter(words[1:])
    for kind in kinds:
        one, two, three = next(rest), next(rest), next(rest)
        turns.append(
            {"role": "user" if kind == "ask" else "tool", "content": one}
            if kind in ("ask", "result")
            else said(
                one if "say" in kind else "", **({"tool_calls": [call(two, {three: one})]} if "call" in kind else {})
            )
        )
    return turns


@quickly
@given(st.sampled_from(["chatml", "terse"]), KINDS, st.sampled_from(["say", "call"]), KINDS, st.data())
def test_what_counts_does_not_depend_on_the_words(
    built: dict[str, ChatTokenizer], name: str, prompt: list[str], first: str, more: list[str], data: st.DataObject
) -> None:
    """Words that occur in the template and in each other, against words that occur nowhere else."""
    kinds = [*prompt, first, *more, "say"]
    count = 1 + 3 * len(kinds)
    if name == "terse":
        kinds = [kind.removesuffix(" and say") for kind in kinds]
    short = data.draw(st.lists(st.sampled_from(WORDS), min_size=count, max_size=count))
    unique = [f"QZ{at}ZQ" for at in range(count)]
    loss_on = data.draw(st.sampled_from(["response", "answer", "assistant"]))
    found = []
    for words in (short, unique):
        turns = talk(kinds, words)
        row = row_of(turns[: 1 + len(prompt)], *turns[1 + len(prompt) :])
        try:
            found.append(rendered(built[name], row, loss_on=loss_on)[:2])
        except RowRefused as refusal:
            found.append((refusal.reason, []))
    expected = [re.sub(r"QZ(\d+)ZQ", lambda word: short[int(word[1])], text) for text in (found[1][0], *found[1][1])]
    assert [found[0][0], *found[0][1]] == expected


@pytest.mark.parametrize("loss_on", ["response", "answer", "assistant"])
@pytest.mark.parametrize("name", BUILT)
def test_calls_and_results_between_answers(built: dict[str, ChatTokenizer], name: str, loss_on: str) -> None:
    """By hand: the calls and the answer count with what closes them, and neither results nor questions do."""
    row = row_of([ASK], said("", tool_calls=[call("f", {"n": "r"})]), {"role": "tool", "content": "r"}, said("a"))
    calls = {
        "chatml": ('\n<tool_call>\n{"name": "f", "arguments": {"n": "r"}}\n</tool_call><|im_end|>\n', "a<|im_end|>\n"),
        "terse": ('[CALLS] {"name": "f", "arguments": {"n": "r"}}[/CALLS]', " a<|im_end|>"),
        "headed": ('{"name": "f", "parameters": {"n": "r"}}<|im_end|>', "a<|im_end|>"),
    }
    text, counted, _ = rendered(built[name], row, loss_on=loss_on)
    if loss_on == "response":
        assert len(counted) == 1 and counted[0].replace(EMPTY_THINK, "").startswith(calls[name][0])
        assert text.endswith(counted[0])
    else:
        assert tuple(part.replace(EMPTY_THINK, "") for part in counted) == calls[name]


# --- openings ---


@pytest.mark.parametrize("think", ["keep", "drop"])
@pytest.mark.parametrize("loss_on", ["response", "answer", "assistant"])
@pytest.mark.parametrize("name", BUILT)
def test_an_answer_counts_from_where_its_opening_ends(
    built: dict[str, ChatTokenizer], name: str, loss_on: str, think: str
) -> None:
    closing = {"chatml": "<|im_end|>\n"}.get(name, "<|im_end|>")
    for opening, rest in (
        ("t", "h"),
        ("The answer is", " yes"),
        ("The answer is ", "yes"),
        ("a\n", "\nb"),
        ("think", "t"),
    ):
        row = {"prompt": [ASK, said(opening)], "chosen": [said(rest)], "rejected": [said("no")]}
        _, counted, _ = rendered(built[name], row, loss_on=loss_on, think=think)
        assert counted == [rest + closing]


def test_an_opened_thought_goes_on(built: dict[str, ChatTokenizer]) -> None:
    row = {
        "prompt": [ASK, said("<think>\nLet me")],
        "chosen": [said(" see.\n</think>\n\n4")],
        "rejected": [said(" no.\n</think>\n\n5")],
    }
    assert rendered(built["chatml"], row)[1] == [" see.\n</think>\n\n4<|im_end|>\n"]


def test_a_long_opening_is_cut_with_the_prompt(built: dict[str, ChatTokenizer]) -> None:
    row = {"prompt": [ASK, said("the cat " * 30)], "chosen": [said("sat")], "rejected": [said("rained")]}
    (pair,) = to_pairs(row, "f", 1)
    encoded = Encoder(built["chatml"], 20, truncate="left").encode(pair)
    ids, mask = encoded.pair.side(0)
    assert encoded.truncated and len(ids) <= 20
    assert built["chatml"].decode(ids[mask == 1]) == " sat<|im_end|>\n"
