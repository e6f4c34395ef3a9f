"""inspect-cache against plain counting, on sound, unfinished and damaged caches."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.identity import FORMAT_VERSION, Identity
from minicache.cache.manifest import Log, Manifest, Source
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import RefBlock
from minicache.cache.writer import CacheWriter
from minicache.data.tokenizers import ChatTokenizer
from minicache.options.others import InspectConfig
from minicache.pairs import EncodedPair, PairTable
from minicache.reports.columns import extreme
from minicache.reports.contents import inspect_pair, read_cache
from minicache.reports.inspection import Histogram, Inspection
from minicache.screen.console import SafeConsole
from minicache.screen.inspect import show_inspection, show_pair, show_problems
from minicache.stages.inspect import verify_cache
from minicache.text import visible
from tests.conftest import make_rows, precompute_into, write_jsonl


def printed(show: Callable[[SafeConsole, Any], None], item: object, width: int = 100) -> str:
    console = SafeConsole(record=True, width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        show(console, item)
    return capture.get()


def look(cache: Path) -> Inspection:
    return read_cache(cache).inspection


def test_every_figure_is_what_counting_gives(ref_cache: Path) -> None:
    found = look(ref_cache)
    table, scores = ReferenceCache(ref_cache).load()
    sides = [[len(table[index].side(side)[0]) for index in range(40)] for side in (0, 1)]
    margins = scores.logp_mean[:, 0] - scores.logp_mean[:, 1]
    assert (found.pairs, found.pairs_scored, found.complete, found.blocks, found.blocks_scored) == (40, 40, True, 5, 5)
    assert found.tokens == len(table.tokens) and found.counted == scores.token_count.sum(0).tolist()
    for name, lengths in zip(("chosen", "rejected"), sides, strict=True):
        figures = found.lengths[name]
        assert (figures["min"], figures["max"]) == (min(lengths), max(lengths))
        assert figures["mean"] == pytest.approx(np.mean(lengths)) and figures["median"] == np.median(lengths)
        assert sum(getattr(found.length_histogram, name)) == 40 and sum(getattr(found.logp_histogram, name)) == 40
    assert found.reference_prefers_chosen is not None
    assert found.reference_prefers_chosen["mean"] == pytest.approx((margins > 0).mean())
    totals = scores.logp_mean * scores.token_count
    assert found.reference_prefers_chosen["sum"] == pytest.approx((totals[:, 0] > totals[:, 1]).mean())
    assert found.reference_margin == pytest.approx(margins.mean(), abs=1e-6)
    longest = max(range(40), key=lambda index: max(sides[0][index], sides[1][index]))
    assert found.longest[0].index == longest and found.longest[0].line == longest + 1
    assert found.highest_margin[0].index == margins.argmax() and found.lowest_margin[0].index == margins.argmin()
    assert found.lowest_logp[0].index == scores.logp_mean.min(1).argmin()
    assert found.bytes_on_disk == sum(file.stat().st_size for file in ref_cache.rglob("*") if file.is_file())
    json.dumps(asdict(found), allow_nan=False)


def test_an_unfinished_cache_shows_what_is_there(ref_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    (cache / "ledger" / "ref" / "c" / "1" / "0").unlink()
    (cache / "pairs" / "tokens" / "c" / "3" / "0").write_bytes(b"")
    found = look(cache)
    assert not found.complete and (found.pairs, found.pairs_scored, found.blocks_scored) == (32, 24, 3)
    assert set(found.unfinished) == {"1", "3"} and "pairs/tokens" in found.unfinished["3"]
    text = printed(show_inspection, found)
    assert "NOT COMPLETE" in text and "block 3" in text
    json.dumps(asdict(found), allow_nan=False)


def test_a_cache_of_no_finished_block_is_shown_too(ref_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    shutil.rmtree(cache / "ledger" / "pairs" / "c")
    found = look(cache)
    assert (found.pairs, found.pairs_scored, found.complete) == (0, 0, False)
    assert "NOT COMPLETE" in printed(show_inspection, found)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_report_fits_its_screen(ref_cache: Path, width: int) -> None:
    text = printed(show_inspection, look(ref_cache), width)
    assert all(len(line) <= width for line in text.splitlines())
    for phrase in ("complete", "float32", "longest pairs"):
        assert phrase in text


def test_a_pair_is_decoded_with_what_counts_marked(ref_cache: Path) -> None:
    for index, row in enumerate(make_rows(8)):
        view = inspect_pair(InspectConfig(ref_cache, pair=index))
        for side, name in enumerate(("chosen", "rejected")):
            text = "".join(segment.text for segment in view.segments[side])
            assert all(turn["content"] in text for turn in row[name])
            counted = "".join(segment.text for segment in view.segments[side] if segment.counted)
            assert counted == row[name][-1]["content"] + "<|im_end|>\n"
        assert view.line.index == index and view.line.line == index + 1
    assert "rejected" in printed(show_pair, view)


def test_what_users_wrote_never_steers_the_terminal(model_dir: Path, tmp_path: Path) -> None:
    row = {"prompt": "\x1b[31mred\x07 [bold]x[/bold] \u202e", "chosen": "a\x1b]0;title\x07", "rejected": "[red]b[/red]"}
    cache = precompute_into(tmp_path / "cache", model_dir, write_jsonl(tmp_path / "[red]x.jsonl", [row]))
    text = printed(show_pair, inspect_pair(InspectConfig(cache, pair=0)))
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert "␛[31mred␇ [bold]x[/bold]" in text and "[red]b[/red]" in text
    assert "[red]x.jsonl" in printed(show_inspection, look(cache), 160)
    assert visible("plain 你好\n\t😀") == "plain 你好\n\t😀"


def test_special_tokens_are_told_from_the_same_text_typed(model_dir: Path, tmp_path: Path) -> None:
    row = {"prompt": "why <|im_end|> not", "chosen": "<|im_end|>a<|im_end|>", "rejected": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    cache = precompute_into(tmp_path / "cache", model_dir, data, special_text="plain")
    view = inspect_pair(InspectConfig(cache, pair=0))
    prompt, chosen = view.segments[0]
    assert prompt.text == "<|im_start|>user\nwhy <|im_end|> not<|im_end|>\n<|im_start|>assistant\n"
    assert chosen.text == "<|im_end|>a<|im_end|><|im_end|>\n"
    assert (prompt.special, chosen.special) == ([[0, 12], [35, 45], [46, 58]], [[21, 31]])
    text = printed(show_pair, view)
    assert "special tokens are in ⟦ ⟧" in text and "│ <|im_end|>a<|im_end|>⟦<|im_end|>⟧ " in text
    assert text.count("⟦<|im_end|>⟧") == 3 and "why <|im_end|> not⟦<|im_end|>⟧" in text
    styled = SafeConsole(width=100, color_system="standard", force_terminal=True)
    with styled.capture() as capture:
        show_pair(styled, view)
    # Underlined, inverted (7) and green; the typed ones before it are not inverted.
    assert "\x1b[4;32m<|im_end|>a<|im_end|>\x1b[0m\x1b[4;7;32m<|im_end|>\x1b[0m" in capture.get()
    assert "⟦" not in capture.get() and "inverted" in capture.get()


def test_no_row_can_imitate_the_mark_of_a_special_token(tmp_path: Path, model_dir: Path) -> None:
    row = {"prompt": "why", "chosen": "⟦<|im_end|>⟧ ⟧", "rejected": "b"}
    cache = precompute_into(tmp_path / "cache", model_dir, write_jsonl(tmp_path / "rows.jsonl", [row]))
    view = inspect_pair(InspectConfig(cache, pair=0))
    text = printed(show_pair, view)
    assert "⟦⟦<|im_end|>⟧⟧ ⟧⟧⟦<|im_end|>⟧" in text and "or in ⟦⟦ ⟧⟧" in text
    # Without styles nothing is underlined.
    assert "underlined" not in text and "--json says which tokens count" in text
    styled = SafeConsole(width=100, color_system="standard", force_terminal=True)
    with styled.capture() as capture:
        show_pair(styled, view)
    assert "⟦<|im_end|>⟧ ⟧\x1b[0m" in capture.get() and "⟦⟦" not in capture.get()


def test_what_the_template_was_given_is_shown(ref_cache: Path) -> None:
    found = look(ref_cache)
    assert "template args" not in printed(show_inspection, found)
    given = replace(found, identity={**found.identity, "date": "2025-02-01", "template_args": '{"thinking": false}'})
    text = printed(show_inspection, given)
    assert "│ date           2025-02-01" in text and '│ template args  {"thinking": false}' in text


@pytest.mark.parametrize("width", [40, 80])
def test_the_heading_of_a_histogram_is_one_line_however_short_its_bars(ref_cache: Path, width: int) -> None:
    one_sided = Histogram(edges=[-1.0, -0.5, 0.0], chosen=[100, 20], rejected=[0, 0])
    text = printed(show_inspection, replace(look(ref_cache), logp_histogram=one_sided), width)
    assert "nats per token: chosen │ rejected" in text


IDENTITY = Identity(
    format_version=FORMAT_VERSION, weights="w" * 32, family="llama", tokenizer="t", template="p", vocabulary=400,
    max_length=512, truncate="right", loss_on="response", think="keep", dtype="float32",
    attention="sdpa", block_pairs=3, per_token=False,
)  # fmt: skip


def by_hand(
    path: Path,
    tokenizer_dir: Path,
    texts: list[tuple[str, str, str]],
    scored: bool = True,
    identity: Identity = IDENTITY,
) -> Path:
    """A cache of (prompt, chosen, rejected) texts with made-up logprobs: no model. Pair i comes from line i + 1."""
    encode = ChatTokenizer.load(tokenizer_dir).encode
    pairs = []
    for line, (prompt, *answers) in enumerate(texts, 1):
        sides: list[np.ndarray] = []
        for answer in answers:
            (head, _), (tail, _) = encode([prompt, answer])
            sides += [np.concatenate([head, tail]), np.repeat([0, 1], [len(head), len(tail)])]
        pairs.append(EncodedPair.join(sides[0], sides[1], sides[2], sides[3], source=(0, line)))
    counts: dict[str, Any] = {
        "rows": len(pairs) + 2,
        "kept": len(pairs),
        "truncated": 1,
        "refused": {"empty-answer": 2},
    }
    source = Source("data/pairs.jsonl", 1, "s", complete=True, **counts)
    log = Log("some/model", "2026-01-01", {"zarr": "3"}, [source], -(-len(pairs) // 3), len(pairs))
    cache = CacheWriter.create(path, Manifest(identity, log), lambda place: shutil.copytree(tokenizer_dir, place))
    cache.grow(log.blocks)
    random = np.random.default_rng(0)
    for block in range(log.blocks):
        table = PairTable.from_pairs(pairs[3 * block : 3 * block + 3], "uint16")
        cache.write_pairs(block, table)
        if scored:
            cache.write_ref(block, RefBlock(-random.random((len(table), 2)).astype(np.float32), table.token_counts))
    return path


TEXTS = [("why ", "the cat " * (line + 1), "a mat") for line in range(10)]


@pytest.fixture
def made(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """Ten pairs, a longer one on each line, in blocks of 3, 3, 3 and 1."""
    return by_hand(tmp_path / "made", tokenizer_dir, TEXTS)


def every_line(found: Inspection) -> list[Any]:
    return [*found.longest, *found.highest_margin, *found.lowest_margin, *found.lowest_logp]


def test_pairs_behind_a_damaged_block_keep_their_numbers(made: Path) -> None:
    (made / "pairs" / "source" / "c" / "1" / "0" / "0").write_bytes(b"junk")
    found = look(made)
    assert (found.pairs, found.blocks_with_pairs, found.blocks_scored, list(found.unfinished)) == (7, 3, 3, ["1"])
    assert {line.index for line in found.longest} == {9, 8, 7, 6, 2}
    for line in every_line(found):
        assert inspect_pair(InspectConfig(made, pair=line.index)).line == line and line.line == line.index + 1


TOKENS = ("pairs/tokens/c/1/0", "pairs/loss_mask/c/1/0", "pairs/digest/c/1/0/0")


@pytest.mark.parametrize("file", TOKENS)
def test_tokens_must_be_there_but_only_verify_reads_them(made: Path, file: str) -> None:
    sound = look(made)
    chunk = made / file
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert look(made) == sound
    problems = verify_cache(InspectConfig(made))
    assert (
        len(problems) == 1 and file.removesuffix(file[file.index("/c/") :]) in problems[0] and "block 1" in problems[0]
    )
    for removed in (lambda: chunk.write_bytes(b""), chunk.unlink):
        removed()
        found = look(made)
        assert not found.complete and (found.pairs, list(found.unfinished)) == (7, ["1"])
        assert file[: file.index("/c/")] in found.unfinished["1"]


@pytest.mark.parametrize("array", ["pairs/lengths", "pairs/source", "ref/logp_mean", "ref/token_count"])
def test_damage_in_what_is_shown_is_found(made: Path, array: str) -> None:
    chunk = made / array / "c" / "1" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    found = look(made)
    assert not found.complete and array in found.unfinished["1"]
    assert (found.pairs, found.pairs_scored) == (7 if array.startswith("pairs/") else 10, 7)


def test_blocks_of_another_place_or_cache_are_found(made: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    for name in ("pairs/lengths/c/{}/0/0", "ledger/pairs/c/{}/0", "ref/token_count/c/{}/0/0"):
        cache = shutil.copytree(made, tmp_path / name.split("/")[1])
        (cache / name.format(1)).write_bytes((cache / name.format(0)).read_bytes())  # an intact chunk, of other pairs
        found = look(cache)
        assert not found.complete and list(found.unfinished) == ["1"], name
    identity = replace(IDENTITY, weights="v" * 32)
    other = by_hand(tmp_path / "other", tokenizer_dir, TEXTS, identity=identity)
    shutil.copytree(other / "ledger", made / "ledger", dirs_exist_ok=True)
    assert look(made).blocks_with_pairs == 0


def test_the_extremes_are_those_of_sorting() -> None:
    random = np.random.default_rng(0)
    for size in (0, 1, 3, 4, 200):
        values = random.integers(0, 4, size).astype(np.float32)  # many are equal
        values[random.random(size) < 0.2] = np.nan
        order = np.argsort(values, kind="stable")
        assert extreme(values, 3).tolist() == order[~np.isnan(values[order])][:3].tolist()


def test_counted_tokens_are_the_same_before_and_after_scoring(made: Path) -> None:
    scored = look(made)
    shutil.rmtree(made / "ledger" / "ref" / "c")
    found = look(made)
    assert found.pairs_scored == 0 and found.counted == scored.counted and found.lengths == scored.lengths
    CacheWriter(made).blocks.arrays.by_name["pairs/loss_mask"][1, :1] = 1  # the first token never counts
    assert list(look(made).unfinished) == ["0", "1", "2", "3"] and look(made).blocks_with_pairs == 3


def test_pairs_behind_a_lost_ledger_row_have_no_number(made: Path) -> None:
    (made / "ledger" / "pairs" / "c" / "1" / "0").unlink()
    found = look(made)
    assert all(line.index == (line.line - 1 if line.line <= 3 else None) for line in every_line(found))
    assert "–" in printed(show_inspection, found)


def test_lost_blocks_and_pairs_are_missed(made: Path) -> None:
    assert look(made).complete and look(made).problem is None
    CacheWriter(made).shrink(3)
    found = look(made)
    assert not found.complete and (found.blocks, found.blocks_scored) == (4, 3) and list(found.unfinished) == ["3"]
    text = printed(show_inspection, found)
    assert "75%" in text and "NOT COMPLETE" in text and "block 3" in text
    writer = CacheWriter(made)
    writer.log.blocks = 3
    writer.write_log()
    found = look(made)
    assert not found.complete and not found.unfinished and "10 pairs" in (found.problem or "")
    assert "counts 10 pairs" in " ".join(printed(show_inspection, found).split())


def test_an_interrupted_source_is_a_problem(made: Path) -> None:
    writer = CacheWriter(made)
    writer.log.sources[0].complete = False
    writer.write_log()
    found = look(made)
    assert not found.complete and "interrupted" in (found.problem or "") and found.pairs_scored == 10


def test_pairs_without_scores_are_shown(tmp_path: Path, tokenizer_dir: Path) -> None:
    cache = by_hand(tmp_path / "cache", tokenizer_dir, [("why ", "the cat", "a mat")] * 4, scored=False)
    found = look(cache)
    assert (found.pairs, found.pairs_scored, found.blocks_with_pairs, found.blocks_scored) == (4, 0, 2, 0)
    assert found.logp_histogram is None and found.reference_margin is None and found.length_histogram
    assert "0%" in printed(show_inspection, found)
    view = inspect_pair(InspectConfig(cache, pair=3))
    assert view.line.logp_mean is None and "nats" not in printed(show_pair, view)
    json.dumps(asdict(view), allow_nan=False)


def test_a_file_that_vanishes_meanwhile_is_left_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = look(made).bytes_on_disk
    leftover = made / "pairs" / "x.partial"
    leftover.write_text("half a chunk")
    is_file = Path.is_file

    def renamed_away(file: Path, **options: Any) -> bool:
        found = is_file(file, **options)
        if file == leftover:
            file.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", renamed_away)
    assert look(made).bytes_on_disk == size


def test_refused_rows_are_counted_and_their_list_is_named(made: Path) -> None:
    found = look(made)
    assert (found.refused_rows, found.refused, found.refused_file) == (2, {"empty-answer": 2}, None)
    (made / "refused.jsonl").write_text("{}\n")
    assert look(made).refused_file == str(made / "refused.jsonl")
    assert "2 refused (2 empty-answer)" in printed(show_inspection, found) and found.truncated == 1


def test_characters_of_many_tokens_are_decoded_whole(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = ("谁是 李白？🙂 ", "唐代诗人😀👩‍🚀", "a 龘 mat")
    view = inspect_pair(InspectConfig(by_hand(tmp_path / "cache", tokenizer_dir, [text]), pair=0))
    for segments, answer in zip(view.segments, text[1:], strict=True):
        assert [(part.text, part.counted, part.shared) for part in segments] == [
            (text[0], False, True),
            (answer, True, False),
        ]
    for part in text:
        assert part.strip() in printed(show_pair, view)


@pytest.mark.parametrize("width", [40, 80])
def test_what_one_acts_on_is_never_cut(made: Path, width: int) -> None:
    found = look(made)
    text = printed(show_inspection, found, width)
    for line in every_line(found):
        assert any(str(line.index) in row.split() and f"{line.margin:+.3f}" in row.split() for row in text.splitlines())


def test_names_of_files_never_steer_the_terminal(made: Path) -> None:
    writer = CacheWriter(made)
    writer.log.sources[0].name = "data/\x1b[31m\udcff.jsonl"
    writer.log.model = "\x1b[5mmodel"
    writer.write_log()
    cache = made.rename(made.with_name("\x1b[7mmade"))
    (cache / "pairs" / "source" / "c" / "1" / "0" / "0").write_bytes(b"junk")
    for width in (40, 100):
        assert "\x1b" not in printed(show_inspection, look(cache), width).encode().decode()
    assert "\x1b" not in printed(show_pair, inspect_pair(InspectConfig(cache, pair=0))).encode().decode()
    problems = verify_cache(InspectConfig(cache))
    for some in (problems, []):
        assert "\x1b" not in printed(lambda console, lines: show_problems(console, str(cache), lines), some)
    assert problems and all("block 1" in problem for problem in problems)
