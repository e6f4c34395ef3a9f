"""The rows of ../shared/cases: what is due of each, by hand-made and by MiniMind 3's templates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from tests.references.families import SMOLLM2

SHARED = Path(__file__).parents[3] / "shared"
CASES = SHARED / "cases"
FILES = sorted(CASES.glob("k*/*.jsonl"))
REFUSED = {
    "k06-images/trl": ("media", "'images'"),
    "k07-other-context-columns/prompt-beside-instruction-input": ("unused-field", "'input'"),
    "k07-other-context-columns/prompt-text-not-in-the-sides": ("prompts-differ", "prompt"),
}

pytestmark = pytest.mark.skipif(not FILES, reason=f"needs {CASES}")


def name_of(file: Path) -> str:
    return file.relative_to(CASES).as_posix().removesuffix(".jsonl")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ChatTokenizer]:
    """The tokenizers that the cases name; those that are not there are MiniMind 3's with the other's template, for texts."""
    own = ChatTokenizer.load(SHARED / "fixtures" / "minimind" / "minimind3-tokenizer")

    def with_template(name: str, **special: str) -> ChatTokenizer:
        text = SMOLLM2 if name == "smol" else (CASES / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        return replace(own, template=text, special={**own.special, **special})

    llama = replace(with_template("llama31", bos_token="<|begin_of_text|>"), date="2026-11-25")
    found = {"mm3": own, "smol": with_template("smol"), "qwen": with_template("qwen25"), "llama3": llama}
    return found | {
        name: with_template(name)
        for name in ("deepseek_r1", "mistral_small", "gptoss", "phi4", "plain_trl", "qwen3", "mistral1")
    }


def sides_of(tokenizer: ChatTokenizer, row: object, **options: str) -> list[tuple[str, int, int]]:
    """For chosen and rejected: the text with the counted part in « and », the tokens, the counted ones."""
    (pair,) = to_pairs(row, "f", 1)
    encoder = Encoder(tokenizer, 4096, **options)
    rendered, _ = encoder._renderer.render(pair)
    encoded, found = encoder.encode(pair).pair, []
    for number, side in enumerate(rendered):
        text = side.text
        for begin, end in reversed(side.spans):
            text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
        ids, mask = encoded.side(number)
        found.append((text, len(ids), int(mask.sum())))
    return found


@pytest.mark.parametrize("file", [file for file in FILES if "k12" not in file.parts[-2]], ids=name_of)
def test_a_case_comes_out_as_due(file: Path, tokenizers: dict[str, ChatTokenizer]) -> None:
    due = json.loads(file.with_suffix("").with_suffix(".expected.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if name_of(file) in REFUSED:
        reason, named = REFUSED[name_of(file)]
        with pytest.raises(RowRefused, match=named) as refused:
            to_pairs(rows[0], "f", 1)
        assert refused.value.reason == reason
        return
    for name, sides in due.items():
        if name == "verdict":
            continue
        for found, side in zip(sides_of(tokenizers[name], rows[0]), ("chosen", "rejected"), strict=True):
            assert found[0] == sides[side]["text"], (name, side)
            if name == "mm3":
                assert found[1:] == (sides[side]["tokens"], sides[side]["counted"])


def row_of(case: str) -> object:
    return json.loads((CASES / f"{case}.jsonl").read_text(encoding="utf-8").splitlines()[0])


def test_rows_that_differ_in_the_system_text_are_three_pairs(tokenizers: dict[str, ChatTokenizer]) -> None:
    lines = (CASES / "k01-system-column/three-rows-differ-only-in-system.jsonl").read_text().splitlines()
    for name in ("mm3", "smol"):
        digests = {
            Encoder(tokenizers[name], 500).encode(to_pairs(json.loads(line), "f", 1)[0]).pair.digest for line in lines
        }
        assert len(digests) == 3


@pytest.mark.parametrize("loss_on", ["response", "answer", "assistant"])
def test_what_a_template_drops_is_refused_whatever_counts(tokenizers: dict[str, ChatTokenizer], loss_on: str) -> None:
    for case, template in (
        ("k08-template-drops-content/r1-thoughts", "deepseek_r1"),
        ("k03-tool-calls/call-in-context", "phi4"),
        ("k02-tools-column/objects", "smol"),
        ("k04-reasoning-content/answers", "smol"),
    ):
        with pytest.raises(RowRefused) as refused:
            sides_of(tokenizers[template], row_of(case), loss_on=loss_on)
        assert refused.value.reason in ("template", "unused-field")


def test_a_template_that_asks_for_the_date_gets_a_fixed_one(tokenizers: dict[str, ChatTokenizer]) -> None:
    row = row_of("k09-strftime-now/any-row")
    for name in ("mistral_small", "gptoss"):
        assert "2024-07-26" in sides_of(tokenizers[name], row)[0][0]
        assert "2026-11-25" in sides_of(replace(tokenizers[name], date="2026-11-25"), row)[0][0]


def test_a_prompt_that_ends_in_the_assistants_turn_goes_on(tokenizers: dict[str, ChatTokenizer]) -> None:
    row = row_of("k11-prefilled-assistant/prompt-ends-in-assistant")
    assert sides_of(tokenizers["smol"], row)[0][0].endswith("assistant\nThe answer is« yes<|im_end|>\n»")
    for name in ("qwen", "mm3", "llama3", "mistral1", "phi4"):
        assert "The answer is« yes" in sides_of(tokenizers[name], row)[0][0]


def test_users_words_between_answers_do_not_count_under_answer(tokenizers: dict[str, ChatTokenizer]) -> None:
    row = row_of("k13-user-turns-inside-answers/two-turn-answers")
    for name in ("smol", "qwen", "mm3", "qwen3", "phi4", "deepseek_r1"):
        text = sides_of(tokenizers[name], row, loss_on="answer")[0][0]
        counted = [part.partition("»")[0] for part in text.split("«")[1:]]
        assert [part.replace("<think>\n\n</think>\n\n", "")[0] for part in counted] == ["a", "c"]


def test_contents_that_were_rendered_before_are_noted(tokenizers: dict[str, ChatTokenizer]) -> None:
    (pair,) = to_pairs(row_of("k12-rendered-twice/pre-rendered-chatml"), "f", 1)
    assert ("special-text", "<|im_start|>") in Encoder(tokenizers["smol"], 500).encode(pair).notes
