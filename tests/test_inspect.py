"""inspect-cache against plain counting, on sound, unfinished and damaged caches."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from minicache.cache.reader import ReferenceCache
from minicache.config import InspectConfig
from minicache.screen_inspect import show_inspection, show_pair, visible
from minicache.stages.inspect import Inspection, inspect_cache, inspect_pair
from tests.conftest import make_rows, precompute_into, write_jsonl


def printed(show, item: object, width: int = 100) -> str:
    console = Console(record=True, width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        show(console, item)
    return capture.get()


def look(cache: Path) -> Inspection:
    return inspect_cache(InspectConfig(cache))


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
