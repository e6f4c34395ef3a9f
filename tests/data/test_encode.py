"""Where the answer begins, what counts, what is cut: each against a plain computation on bytes or lists."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from minicache.data.encode import CHUNK, Encoder
from minicache.data.formats import to_pair
from minicache.data.records import Pair, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from tests.conftest import WORDS, Row, make_rows
from tests.data.test_tokenizers import LLAMA3, MARKED, MISTRAL, QWEN3, TEMPLATES, with_template
from tests.references.conversations import assistant_mask, encode, shifted

# texts that are hard on tokens: several tokens a character, whitespace at the ends, words of the templates themselves
HARD = [
    "on a mat",
    "你好世界",
    "😀👩‍👩‍👧",
    " two  spaces ",
    "\n\nthe cat\n",
    "a",
    "think",
    "assistant",
    "im_end",
    "<b>not</b>",
    "```\ncode\n```\n",
    "é e\u0301 \u2028 \x00",
]
Pieces = list[tuple[str, bool]]  # text, and whether it counts


@pytest.fixture
def chatml(tokenizer_dir: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tokenizer_dir)


def conversation(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("user" if at % 2 == 0 else "assistant", text) for at, text in enumerate(texts))


def pair_of(*prompt: str, chosen: str = "on a mat", rejected: str = "and then it rained", line: int = 1) -> Pair:
    return Pair(conversation(*prompt), (Turn("assistant", chosen),), (Turn("assistant", rejected),), "f", line)


# --- the plain computation: bytes of every token, no offsets ---


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as in its encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def token_bytes(tokenizer: ChatTokenizer, token: int) -> bytes:
    added = tokenizer.backend.get_added_tokens_decoder()
    if token in added:
        return added[token].content.encode()
    signs = tokenizer.backend.id_to_token(token)
    assert signs is not None
    return bytes(ALPHABET[sign] for sign in signs)


def plain_mask(tokenizer: ChatTokenizer, ids: list[int], pieces: Pieces) -> list[int]:
    """1 for each token that holds a byte of a counted piece; nothing predicts the first token."""
    counts = b"".join((b"\1" if counted else b"\0") * len(text.encode()) for text, counted in pieces)
    mask, position = [], 0
    for token in ids:
        end = position + len(token_bytes(tokenizer, token))
        mask.append(int(1 in counts[position:end]))
        position = end
    assert position == len(counts)
    return [0, *mask[1:]]


def require_pieces(encoder: Encoder, pair: Pair, side: int, pieces: Pieces) -> None:
    ids, mask = encoder.encode(pair)[0].side(side)
    text = "".join(text for text, _ in pieces)
    assert ids.tolist() == encoder.tokenizer.encode([text])[0][0].tolist()
    assert mask.tolist() == plain_mask(encoder.tokenizer, ids.tolist(), pieces)


def chatml_pieces(turns: tuple[Turn, ...]) -> Pieces:
    """ChatML written out; what the assistant says counts, with what closes it."""
    pieces: Pieces = []
    for turn in turns:
        pieces += [(f"<|im_start|>{turn.role}\n", False), (f"{turn.content}<|im_end|>\n", turn.role == "assistant")]
    return pieces


# --- the boundary between prompt and answer ---


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_begins_where_the_opened_prompt_ends(tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    """In every template, for every hard answer: what counts is all that follows the prompt opened for it."""
    tokenizer = with_template(tokenizer_dir, tmp_path, TEMPLATES[name])
    for question, answer in [(a, b) for a in HARD for b in HARD]:
        pair = pair_of("why", answer, question, chosen=answer + "!", rejected=answer)
        opened = tokenizer.render(pair.prompt, open_answer=True)
        for side, turns in enumerate((pair.chosen, pair.rejected)):
            text = tokenizer.render(pair.prompt + turns)
            assert text.startswith(opened)
            require_pieces(Encoder(tokenizer, 9999), pair, side, [(opened, False), (text[len(opened) :], True)])


def test_a_token_across_the_boundary_belongs_to_the_answer(tokenizer_dir: Path, tmp_path: Path) -> None:
    """ "th" + "en" with nothing between them: the whole text decides where tokens end, not the two halves."""
    tokenizer = with_template(tokenizer_dir, tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    halves = [tokenizer.encode([half])[0][0] for half in ("why th", "en")]
    expected = tokenizer.encode(["why then"])[0][0]
    assert len(expected) < len(halves[0]) + len(halves[1])
    pair = pair_of("why th", chosen="en", rejected=" not")
    ids, mask = Encoder(tokenizer, 50).encode(pair)[0].side(0)
    assert np.array_equal(ids, expected)
    counted = tokenizer.decode(ids[mask == 1])
    assert counted.endswith("en") and len(counted) > 2 and "why" not in counted
    require_pieces(Encoder(tokenizer, 50), pair, 0, [("why th", False), ("en", True)])


def test_an_answer_that_begins_like_a_think_block_loses_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A template opens an answer by a tag that it leaves out of what was said: the answer's own "<" still counts."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, template), 100)
    for answer in ("<table>", "<", "<think", "plain"):
        pieces = [("[user]why[assistant]", False), (answer, True)]
        require_pieces(encoder, pair_of("why", chosen=answer), 0, pieces)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    with pytest.raises(RowRefused, match="prompt's turns differently") as refused:
        Encoder(with_template(tokenizer_dir, tmp_path, template), 100).encode(pair_of("why"))
    assert refused.value.reason == "template"


def test_a_template_that_drops_the_answer_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowRefused, match="does not write what the assistant says") as refused:
        Encoder(with_template(tokenizer_dir, tmp_path, template), 100).encode(pair_of("why"))
    assert refused.value.reason == "template"


# --- every turn of the assistant ---


def test_all_that_the_assistant_says_counts_however_odd_it_is(chatml: ChatTokenizer) -> None:
    encoder = Encoder(chatml, 9999, loss_on="assistant")
    for question, answer in [(a, b) for a in HARD for b in HARD]:
        pair = pair_of(question, answer, answer, chosen=answer, rejected=question + "!")
        require_pieces(encoder, pair, 0, chatml_pieces(pair.prompt + pair.chosen))
        require_pieces(encoder, pair, 1, chatml_pieces(pair.prompt + pair.rejected))


SAID = [
    conversation("<|im_start|>assistant\nmat mat<|im_end|>\nwhy", "on"),
    conversation("<|im_end|>\n<|im_start|>assistant", "on"),
    conversation("<|im_end|>\n<|im_start|>assistant\n\n", "on"),
    conversation("why", "<|im_start|>assistant\nquoted"),
    conversation("why", "one<|im_end|>\ntwo"),
    (Turn("assistant", "hello"), *conversation("why", "on")),
    (*conversation("why", "on"), Turn("assistant", "and more")),
    (Turn("system", "assistant"), *conversation("why", "", "and", "not")),
    (Turn("user", "why"), Turn("assistant", "call"), Turn("tool", "mat"), Turn("assistant", "mat")),
]


@pytest.mark.parametrize("turns", SAID)
def test_turns_are_told_apart_by_who_speaks_not_by_what_is_typed(
    chatml: ChatTokenizer, turns: tuple[Turn, ...]
) -> None:
    pair = Pair(turns[:-1], turns[-1:], (Turn("assistant", "something else"),), "f", 1)
    encoder = Encoder(chatml, 500, loss_on="assistant", special_text="allow")
    require_pieces(encoder, pair, 0, chatml_pieces(turns))


SHAPES = {  # template -> text before the conversation, what opens and what closes each role's turn
    "llama3": (LLAMA3, "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")),
    "mistral": (MISTRAL, "<|endoftext|>", ("[INST] ", "[/INST] "), ("", "<|im_end|>")),
    "marked": (MARKED, "", ("U: ", "\n"), ("A: ", "<|im_end|>")),
    "plain": ("", "<|endoftext|>", ("User: ", "\n\n"), ("Assistant: ", "<|im_end|>\n\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_frame_of_other_templates_is_found(tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    template, begin, user, assistant = SHAPES[name]
    turns = conversation("why", "a", "the cat", "A: 你好")
    pieces = [(begin, False)]
    for turn in turns:
        opening, closing = assistant if turn.role == "assistant" else user
        pieces += [(opening, False), (turn.content + closing, turn.role == "assistant")]
    tokenizer = with_template(tokenizer_dir, tmp_path, template)
    pair = Pair(turns[:3], turns[3:], (Turn("assistant", "not"),), "f", 1)
    require_pieces(Encoder(tokenizer, 500, loss_on="assistant"), pair, 0, pieces)


def test_a_think_block_counts_with_the_answer_it_stands_before(tokenizer_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, QWEN3), 500, loss_on="assistant")
    pair = pair_of("why", "the cat", "and", chosen="<think>\nhm\n</think>\n\nnot", rejected="on")
    head = [("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n", False), ("the cat<|im_end|>\n", True)]
    head += [("<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n", False)]
    require_pieces(encoder, pair, 0, [*head, ("<think>\nhm\n</think>\n\nnot<|im_end|>\n", True)])
    require_pieces(encoder, pair, 1, [*head, ("<think>\n\n</think>\n\non<|im_end|>\n", True)])


def test_thoughts_that_a_template_leaves_out_of_earlier_turns_cost_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Qwen3 strips the thoughts of earlier turns by design: what it writes of the turn counts, and that is noted."""
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, QWEN3), 500, loss_on="assistant")
    pair = pair_of("why", "<think>\nhm\n</think>\n\nnot", "and")
    head = [("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n", False), ("not<|im_end|>\n", True)]
    head += [("<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n", False)]
    require_pieces(encoder, pair, 0, [*head, ("<think>\n\n</think>\n\non a mat<|im_end|>\n", True)])
    assert encoder.encode(pair).notes == (("left-out", ""),)


def test_the_kinds_of_loss_agree_where_there_is_one_answer(chatml: ChatTokenizer) -> None:
    for answer in HARD:
        pair = pair_of("why", chosen=answer, rejected=answer + "?")
        digests = {Encoder(chatml, 500, loss_on=kind).encode(pair)[0].digest for kind in ("response", "assistant")}
        assert len(digests) == 1


# --- MiniMind ---

THINK = [("minimind2-2504", "keep"), ("minimind2-2510", "keep"), ("minimind3", "keep"), ("minimind3", "drop")]


@pytest.mark.parametrize("max_length", [80, 9999])
@pytest.mark.parametrize(("generation", "think"), THINK)
def test_loss_on_assistant_is_miniminds_mask_to_the_token(
    minimind_tokenizers: dict[str, Path], generation: str, think: str, max_length: int
) -> None:
    """Against the reference of DPODataset, which goes from the ids of the assistant's header to those of what closes a turn."""
    from transformers import AutoTokenizer

    directory = minimind_tokenizers[generation]
    encoder = Encoder(ChatTokenizer.load(directory), max_length, loss_on="assistant", think=think)
    tokenizer, kept, refused = AutoTokenizer.from_pretrained(directory), 0, 0
    for row in [*make_rows(30, seed=4), *hard_rows()]:
        expected = [encode(tokenizer, generation, row[side], max_length, think) for side in ("chosen", "rejected")]
        if not all(any(mask) for _, mask in expected) or expected[0] == expected[1]:
            with pytest.raises(RowRefused, match=r"no answer left|the same tokens"):  # nothing to count, or to prefer
                encoder.encode(to_pair(row, "f", 1))
            refused += 1
            continue
        encoded = encoder.encode(to_pair(row, "f", 1)).pair
        assert [tuple(column.tolist() for column in encoded.side(side)) for side in (0, 1)] == expected
        kept += 1
    assert kept >= 10 and (refused > 0) == (max_length == 80)


def hard_rows() -> list[Row]:
    """Conversations of hard texts: every second one has a system turn, the rejected answer stands behind a think block."""
    rows = []
    for at in range(len(HARD)):
        system, question, answer = (HARD[(at + step) % len(HARD)] for step in (0, 1, 5))
        prompt = [{"role": "system", "content": system}] if at % 2 else []
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt += [{"role": "user", "content": answer}]
        sides = (
            {"role": "assistant", "content": text}
            for text in (f"{answer}!", f"<think>\nhm\n</think>\n\n{question.strip()}")
        )
        chosen, rejected = ([*prompt, side] for side in sides)
        rows.append({"chosen": chosen, "rejected": rejected})
    return rows


@pytest.mark.parametrize(("generation", "think"), THINK)
def test_a_line_break_that_joins_an_answers_spaces_counts_with_them(
    minimind_tokenizers: dict[str, Path], generation: str, think: str
) -> None:
    """Here the masks differ: the original skips such a token behind a header, or does not find the header for it."""
    from transformers import AutoTokenizer

    directory, joined = minimind_tokenizers[generation], "\u010a\u0120"  # a line break and a space
    tokenizer = AutoTokenizer.from_pretrained(directory)
    row = make_rows(2)[1]
    row["chosen"][-1] = {"role": "assistant", "content": "  the cat"}
    ids, mask = encode(tokenizer, generation, row["chosen"], 999, think)
    encoder = Encoder(ChatTokenizer.load(directory), 999, loss_on="assistant", think=think)
    found_ids, found = (column.tolist() for column in encoder.encode(to_pair(row, "f", 1))[0].side(0))
    at = tokenizer.convert_ids_to_tokens(ids).index(joined)
    assert found_ids == ids
    if (generation, think) == ("minimind3", "keep"):
        assert found == mask and mask[at] == 1  # it stands behind a think block
    else:
        assert (found.index(1), sum(found)) == (at, len(ids) - at)
        assert mask == ([0] * len(ids) if generation == "minimind3" else [*found[:at], 0, *found[at + 1 :]])


@pytest.mark.parametrize("skipped", [0, 1])
def test_the_reference_mask_counts_what_it_says(skipped: int) -> None:
    """Letters for ids: a header of two, answers, and what closes them, of which the last is missing."""
    ids = [ord(letter) for letter in "uHHnabc.nuHHnabc"]
    header, closing = ("HH", ".") if skipped else ("HHn", ".n")
    mask = assistant_mask(ids, [*map(ord, header)], [*map(ord, closing)], skipped)
    assert "".join(chr(token) for token, counts in zip(ids, mask, strict=True) if counts) == "abc.nabc"
    assert shifted(ids, mask) == (ids[:-1], ids[1:], mask[1:])


# --- truncation ---


Ids = tuple[list[int], list[int]]  # and mask


def plain_cut(sides: list[Ids], prompt: int, limit: int, how: str) -> str | tuple[list[Ids], bool]:
    """Reason of the refusal, or both sides as they are kept and whether anything was cut; prompt: tokens before answers."""
    sides = [(list(ids), list(mask)) for ids, mask in sides]
    longest = max(len(ids) for ids, _ in sides)
    if longest <= limit:
        return sides, False
    if how == "refuse":
        return "too-long"
    if how == "left":  # a token of the prompt at a time, from both
        while max(len(ids) for ids, _ in sides) > limit and prompt > 0:
            sides, prompt = [(ids[1:], mask[1:]) for ids, mask in sides], prompt - 1
    sides = [(ids[:limit], [0, *mask[1:limit]]) for ids, mask in sides]
    if not all(any(mask) for _, mask in sides):
        return "truncated-away"
    return "identical" if sides[0] == sides[1] else (sides, True)


@pytest.mark.parametrize("truncate", ["right", "left", "refuse"])
@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_truncation_is_what_it_says(chatml: ChatTokenizer, truncate: str, loss_on: str) -> None:
    random = np.random.default_rng(7)
    seen: set[object] = set()
    for line in range(1, 80):
        texts = [" ".join(random.choice(WORDS, random.integers(1, 14))) for _ in range(random.choice([1, 3]))]
        begin = " ".join(random.choice(WORDS, random.integers(0, 9)))  # answers that begin alike
        answers = [f"{begin} {' '.join(random.choice(WORDS, random.integers(1, 14)))}" for _ in range(2)]
        pair = pair_of(*texts, chosen=answers[0] + " why", rejected=answers[1] + " not", line=line)
        whole = Encoder(chatml, 9999, loss_on=loss_on).encode(pair)[0]
        sides = [(whole.side(side)[0].tolist(), whole.side(side)[1].tolist()) for side in (0, 1)]
        longest = max(len(ids) for ids, _ in sides)
        responses = Encoder(chatml, 9999).encode(pair)[0]
        prompt = min(int(responses.side(side)[1].argmax()) for side in (0, 1))
        for limit in {2, *random.integers(3, longest + 3, 4).tolist(), longest - 1, longest}:
            expected = plain_cut(sides, prompt, limit, truncate)
            try:
                encoded, truncated, _ = Encoder(chatml, limit, truncate, loss_on).encode(pair)
            except RowRefused as refusal:
                assert (refusal.reason, refusal.line) == (expected, line)
                seen.add(refusal.reason)
                continue
            kept = [(encoded.side(side)[0].tolist(), encoded.side(side)[1].tolist()) for side in (0, 1)]
            assert (kept, truncated) == expected
            seen.add(truncated)
    outcomes: dict[str, set[object]] = {
        "right": {True, "identical", "truncated-away"},
        "left": {True, "identical"},
        "refuse": {"too-long"},
    }
    assert seen == outcomes[truncate] | {False}


@pytest.mark.parametrize(
    ("reason", "pair", "limit", "truncate"),
    [
        ("truncated-away", pair_of("why " * 50), 20, "right"),
        ("identical", pair_of("why", chosen="the cat sat on", rejected="the cat sat not"), 14, "right"),
        ("identical", pair_of("why " * 50, chosen="the cat sat on", rejected="the cat sat not"), 3, "left"),
        ("too-long", pair_of("why " * 50), 20, "refuse"),
    ],
)
def test_what_truncation_leaves_nothing_of_is_refused(
    chatml: ChatTokenizer, reason: str, pair: Pair, limit: int, truncate: str
) -> None:
    with pytest.raises(RowRefused, match=f"--max-length (is )?{limit}") as refused:
        Encoder(chatml, limit, truncate).encode(pair)
    assert refused.value.reason == reason


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_of_a_prompt_longer_than_the_limit_the_end_is_kept_when_cut_on_the_left(
    chatml: ChatTokenizer, loss_on: str
) -> None:
    """Earlier answers are part of the prompt, whether they count or not."""
    pair = pair_of("why", "not", "why " * 500)
    encoded, truncated, _ = Encoder(chatml, 40, "left", loss_on).encode(pair)
    assert truncated
    for side, answer in enumerate(("on a mat", "and then it rained")):
        ids, mask = encoded.side(side)
        assert chatml.decode(ids[mask == 1]) == f"{answer}<|im_end|>\n"
    assert max(len(encoded.side(side)[0]) for side in (0, 1)) == 40


def test_sides_that_a_template_makes_equal_are_identical(tokenizer_dir: Path, tmp_path: Path) -> None:
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, LLAMA3), 200)
    with pytest.raises(RowRefused) as refused:
        encoder.encode(pair_of("why", chosen="mat", rejected=" mat\n"))
    assert refused.value.reason == "identical"


# --- many rows ---


def test_results_come_in_the_order_of_rows_whatever_is_between(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Refused before, while rendering and after tokenizing, over the border of chunks; and alone as in company."""
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, MISTRAL), 60)
    rows: list[Pair | RowRefused] = []
    for line in range(1, 2 * CHUNK + 40):
        rows.append(pair_of(f"why {line}", line=line))
        if line % 7 == 0:
            refused = RowRefused("broken-json", "x")
            refused.line = line
            rows[-1] = refused
        elif line % 7 == 1:
            rows[-1] = pair_of("two", "turns", line=line)
        elif line % 7 == 2:
            rows[-1] = pair_of("why" * 100, line=line)
    reasons = {0: "broken-json", 1: "template", 2: "truncated-away"}
    results = list(encoder.encode_all(iter(rows), 3))
    for line, (row, item) in enumerate(zip(rows, results, strict=True), start=1):
        if isinstance(item, RowRefused):
            assert (item.line, item.reason) == (line, reasons[line % 7])
            continue
        assert line % 7 > 2 and item[0].source == (3, line)
        assert isinstance(row, Pair) and encoder.encode(row, 3)[0].digest == item[0].digest


WORDWISE = pre_tokenizers.WhitespaceSplit()
PATIENT = pre_tokenizers.Sequence([WORDWISE, pre_tokenizers.Split(Regex("(a+)+b"), "isolated")])
UNKNOWN = {
    "no token, not even for the unknown": (
        models.WordLevel({"the": 0, "cat": 1}, unk_token="[UNK]"),
        WORDWISE,
        "the dog",
    ),
    "a pattern that gives up": (models.WordLevel({"the": 0, "cat": 1}, unk_token="cat"), PATIENT, "a" * 40),
}


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
def test_what_the_tokenizer_cannot_encode_costs_its_row(tmp_path: Path, case: str, place: str) -> None:
    """The second is a panic of a library in Rust, which is no `Exception`."""
    model, pattern, text = UNKNOWN[case]
    backend = Tokenizer(model)
    backend.pre_tokenizer = pattern
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    encoder = Encoder(replace(ChatTokenizer.load(tmp_path), template=template), 99)
    texts = {"prompt": "the", "chosen": "the the", "rejected": "the cat"}
    sound, broken = ({**texts, "chosen": chosen} for chosen in ("the the", "cat the")), {**texts, place: text}
    rows = [pair_of(row["prompt"], chosen=row["chosen"], rejected=row["rejected"]) for row in sound]
    rows.insert(1, pair_of(broken["prompt"], chosen=broken["chosen"], rejected=broken["rejected"], line=7))
    first, refused, last = encoder.encode_all(rows, 0)
    assert isinstance(refused, RowRefused) and (refused.reason, refused.line) == ("tokenizer", 7)
    assert str(refused).startswith("the tokenizer cannot encode it: ")
    for row, found in ((rows[0], first), (rows[2], last)):
        assert not isinstance(found, RowRefused)
        assert np.array_equal(found.pair.tokens, encoder.encode(row).pair.tokens)


def test_rows_are_taken_only_as_they_are_needed(chatml: ChatTokenizer) -> None:
    taken = []

    def endless() -> Iterator[Pair]:
        while True:
            taken.append(1)
            yield pair_of("why")

    results = Encoder(chatml, 100).encode_all(endless(), 0)
    next(results)
    assert len(taken) <= CHUNK


def test_the_same_rows_give_the_same_bytes(tokenizer_dir: Path) -> None:
    runs = []
    for _ in range(2):
        encoder = Encoder(ChatTokenizer.load(tokenizer_dir), 64)
        pairs = [to_pair(row, "f", line) for line, row in enumerate(make_rows(200, seed=3), start=1)]
        items = encoder.encode_all(pairs, 0)
        runs.append([item.reason.encode() if isinstance(item, RowRefused) else item[0].digest for item in items])
    assert runs[0] == runs[1] and len(set(runs[0])) > 150


def test_an_empty_file_of_rows_gives_nothing(chatml: ChatTokenizer) -> None:
    assert list(Encoder(chatml, 100).encode_all([], 0)) == []
