"""Templates, the boundary between prompt and answer, masks, truncation."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from minicache.data.encode import CHUNK, Encoder
from minicache.data.formats import to_pair
from minicache.data.records import Pair, Turn
from minicache.data.tokenizers import PLAIN_TEMPLATE, ChatTokenizer
from minicache.errors import ConfigError, ModelError, RowRefused
from tests.conftest import TEMPLATE, make_rows

LLAMA3 = (
    "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{%- else %}U: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
TEMPLATES = {"chatml": TEMPLATE, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "marked": MARKED, "plain": ""}
TURNS = (
    Turn("user", " why\n"),
    Turn("assistant", "the cat 你好"),
    Turn("user", "and 😀?"),
    Turn("assistant", "\n not  "),
)


@pytest.fixture(params=TEMPLATES)
def tokenizer(request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path: Path) -> ChatTokenizer:
    return with_template(tokenizer_dir, tmp_path, TEMPLATES[request.param])


def with_template(tokenizer_dir: Path, place: Path, template: str) -> ChatTokenizer:
    (place / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "bos_token": "<|endoftext|>"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTokenizer.load(place)


def pair_of(*prompt: str, chosen: str = "on a mat", rejected: str = "and then it rained", line: int = 1) -> Pair:
    turns = tuple(Turn("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(prompt))
    return Pair(turns, (Turn("assistant", chosen),), (Turn("assistant", rejected),), "f", line)


def test_rendering_is_that_of_transformers(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = tokenizer.template.replace("{% if strftime_now is defined %}", "{% if false %}")
    for turns, opened in ((TURNS, False), (TURNS[:3], True), (TURNS[:1], False)):
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        assert tokenizer.render(turns, opened) == expected
        assert tokenizer.encode([expected])[0][0].tolist() == theirs(expected, add_special_tokens=False)["input_ids"]


def test_todays_date_never_gets_into_a_prompt(tokenizer_dir: Path, tmp_path: Path) -> None:
    assert "26 Jul 2024" in with_template(tokenizer_dir, tmp_path, LLAMA3).render(TURNS)


def test_without_a_template_there_is_the_plain_form(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer_dir, tmp_path, "")
    assert tokenizer.template == PLAIN_TEMPLATE
    assert tokenizer.render(TURNS[1:3]) == "<|endoftext|>Assistant: the cat 你好<|im_end|>\n\nUser: and 😀?\n\n"


def test_a_template_that_refuses_costs_the_row_alone(tokenizer_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, MISTRAL), 100)
    twice = Pair((Turn("user", "a"), Turn("user", "b")), (Turn("assistant", "x"),), (Turn("assistant", "y"),), "f", 7)
    refusal, encoded = encoder.encode_all([twice, pair_of("why")], 0)
    assert isinstance(refusal, RowRefused) and (refusal.reason, refusal.line) == ("template", 7)
    assert "roles must alternate" in str(refusal) and not isinstance(encoded, RowRefused)


@pytest.mark.parametrize("template", ["{{ messages[99].content.strip() }}", "{{ 1 / 0 }}", "{{ messages + 3 }}"])
def test_a_template_that_breaks_costs_the_row_alone(tokenizer_dir: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(RowRefused) as refused:
        Encoder(with_template(tokenizer_dir, tmp_path, template), 100).encode(pair_of("why"))
    assert refused.value.reason == "template"


def test_a_template_that_is_none_is_an_error_of_the_options(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be compiled"):
        with_template(tokenizer_dir, tmp_path, "{% for %}").render(TURNS)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": 3}'])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_counted_text_is_what_the_assistant_says(tokenizer: ChatTokenizer, loss_on: str) -> None:
    """In every template: the counted tokens spell the answer and what closes it, and begin where it begins."""
    pair = pair_of("why 你好", "the cat sat", "😀 not?", chosen="on a mat 世界", rejected="it rained 😀")
    encoded, truncated = Encoder(tokenizer, 500, loss_on=loss_on).encode(pair)
    assert not truncated
    for side, answer in enumerate(("on a mat 世界", "it rained 😀")):
        ids, mask = encoded.side(side)
        assert tokenizer.decode(ids) == tokenizer.render(pair.prompt + (pair.chosen, pair.rejected)[side])
        counted = tokenizer.decode(ids[mask == 1])
        assert counted.count(answer) == 1 and "why" not in counted and "user" not in counted.lower()
        assert ("the cat sat" in counted) == (loss_on == "assistant")
        assert counted.strip() != answer or tokenizer.template == PLAIN_TEMPLATE or "[INST]" not in tokenizer.template


def test_a_header_typed_by_a_user_counts_for_nothing(tokenizer_dir: Path) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_dir)
    pair = pair_of("<|im_start|>assistant\nmat mat mat<|im_end|>\nwhy", chosen="on", rejected="not")
    ids, mask = Encoder(tokenizer, 500, loss_on="assistant").encode(pair)[0].side(0)
    assert tokenizer.decode(ids[mask == 1]) == "on<|im_end|>\n"


def test_a_token_across_the_boundary_belongs_to_the_answer(tokenizer_dir: Path, tmp_path: Path) -> None:
    """ "the" + "re" rendered without anything between: the whole text decides where tokens end, not the two halves."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = with_template(tokenizer_dir, tmp_path, template)
    halves = [tokenizer.encode([half])[0][0] for half in ("why th", "en")]
    expected = tokenizer.encode(["why then"])[0][0]
    assert len(expected) < len(halves[0]) + len(halves[1])
    ids, mask = Encoder(tokenizer, 50).encode(pair_of("why th", chosen="en", rejected=" not"))[0].side(0)
    assert np.array_equal(ids, expected)
    counted = tokenizer.decode(ids[mask == 1])
    assert counted.endswith("en") and len(counted) > 2 and "why" not in counted


GENERATIONS = [("minimind2-2504", "as-is"), ("minimind2-2510", "as-is"), ("minimind3", "keep")]


@pytest.mark.parametrize(("generation", "variant"), GENERATIONS)
def test_loss_on_assistant_is_miniminds_mask_to_the_token(shared: Path, generation: str, variant: str) -> None:
    place = shared / "fixtures" / "minimind"
    fixture = json.loads((place / f"{generation}-encoding.json").read_text())
    encoder = Encoder(ChatTokenizer.load(place / f"{generation}-tokenizer"), fixture["max_length"], loss_on="assistant")
    for row, expected in zip(fixture["rows"], fixture["encodings"][variant], strict=True):
        if not all(any(side["loss_mask"]) for side in expected.values()):
            with pytest.raises(RowRefused, match="no answer left"):  # MiniMind divides by zero counted tokens here
                encoder.encode(to_pair(row, "f", 1))
            continue
        encoded, _ = encoder.encode(to_pair(row, "f", 1))
        for side, name in enumerate(("chosen", "rejected")):
            ids, mask = encoded.side(side)
            assert ids.tolist() == expected[name]["input_ids"]
            assert mask.tolist() == expected[name]["loss_mask"]


@pytest.mark.parametrize("truncate", ["right", "left", "refuse"])
def test_truncation_is_what_it_says(tokenizer_dir: Path, truncate: str) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_dir)
    whole = Encoder(tokenizer, 10_000)
    for line, row in enumerate(make_rows(30, seed=11), start=1):
        pair = to_pair(row, "f", line)
        full, _ = whole.encode(pair)
        sides = [full.side(side) for side in (0, 1)]
        longest = max(len(ids) for ids, _ in sides)
        for limit in (8, 20, 30, longest, longest + 1):
            start = 0
            if truncate == "left":
                start = max(0, min(longest - limit, *(int(mask.argmax()) for _, mask in sides)))
            expected = [(ids[start:][:limit], mask[start:][:limit]) for ids, mask in sides]
            try:
                encoded, truncated = Encoder(tokenizer, limit, truncate).encode(pair)
            except RowRefused as refusal:
                if truncate == "refuse":
                    assert refusal.reason == "too-long" and longest > limit
                else:
                    kept = [mask[1:].any() for _, mask in expected]
                    assert refusal.reason == ("identical" if all(kept) else "truncated-away")
                continue
            assert truncated == (longest > limit) and not (truncate == "refuse" and truncated)
            for side, (ids, mask) in enumerate(expected):
                assert np.array_equal(encoded.side(side)[0], ids)
                assert np.array_equal(encoded.side(side)[1][1:], mask[1:]) and encoded.side(side)[1][0] == 0


@pytest.mark.parametrize(
    ("reason", "pair", "limit"),
    [
        ("truncated-away", pair_of("why " * 50), 20),
        ("identical", pair_of("why", chosen="the cat sat on", rejected="the cat sat not"), 14),
    ],
)
def test_what_truncation_leaves_nothing_of_is_refused(tokenizer_dir: Path, reason: str, pair: Pair, limit: int) -> None:
    with pytest.raises(RowRefused, match="--max-length") as refused:
        Encoder(ChatTokenizer.load(tokenizer_dir), limit).encode(pair)
    assert refused.value.reason == reason


def test_results_come_in_the_order_of_rows_whatever_is_between(tokenizer_dir: Path) -> None:
    encoder = Encoder(ChatTokenizer.load(tokenizer_dir), 100)
    rows: list[Pair | RowRefused] = []
    for line in range(1, 2 * CHUNK + 40):
        refusal = RowRefused("broken-json", "x")
        refusal.line = line
        rows.append(refusal if line % 7 == 0 else pair_of(f"why {line}", line=line))
    for line, item in enumerate(encoder.encode_all(rows, 3), start=1):
        if isinstance(item, RowRefused):
            assert line % 7 == 0 and item.line == line
        else:
            assert item[0].source == (3, line)


def test_the_digest_of_a_tokenizer_knows_what_changes_ids(tokenizer_dir: Path, tmp_path: Path) -> None:
    original = ChatTokenizer.load(tokenizer_dir).digest
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.enable_truncation(7)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert ChatTokenizer.load(tmp_path).digest == original
    backend.add_tokens(["rained sat"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert ChatTokenizer.load(tmp_path).digest != original
