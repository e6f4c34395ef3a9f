"""Pages of a cache and of a run: what they find, what they show, and that no text ever becomes markup."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from minicache.cache.places.bounded import BoundedStore
from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import ConfigError, DataError
from minicache.json_lines import json_lines
from minicache.options.others import InspectConfig, ReportConfig
from minicache.pages.cache import _manifest, _refusal, _sources
from minicache.pages.cache_report import EXTREMES, gather
from minicache.pages.charts import HEIGHT, Bars, Line, curves, histogram, thinned
from minicache.pages.compare import Answers
from minicache.pages.compare import page as compare_page
from minicache.pages.markup import Table, Where, render, report
from minicache.pairs import EncodedPair, PairTable
from minicache.reports import suspects
from minicache.reports.columns import READ
from minicache.reports.notes import notes_on
from minicache.reports.pair_text import OWN_SHOWN, Piece, Plain, _texts, pair_texts
from minicache.stages.inspect import read_cache, write_cache_page
from minicache.stages.report import write_run_page
from minicache.text import visible
from minicache.trackers import Silent
from tests.conftest import WORDS, Cli, Row, make_rows, precompute_into, write_jsonl
from tests.helpers.pages import Page
from tests.pictures.test_plot import make_run

NASTY = "</script><img src=x onerror=alert(1)> {{DATA}} {{BODY}} & <!-- \x1b[31m שלום 👍🏽"


def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    def side(text: str) -> list[Row]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]

    return {"chosen": side(chosen), "rejected": side(rejected)}


LONG = " ".join(WORDS * 4)
ODD_ROWS = [
    row("why", "the cat sat", "on a mat"),
    row("why", "on a mat", "the cat sat"),
    row("why not", f"{LONG} cat", f"{LONG} mat"),
    row("then", f"{LONG} it rained", "today " * 12),
    row("and then", f"{LONG} it rained", "today " * 12),
    row(NASTY, NASTY, f"{NASTY} no"),
    row("a long one", "word " * 700, "cat"),
    row("same", "same", "same"),
]


@pytest.fixture(scope="module")
def odd_cache(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """20 plain rows and some that something is wrong with, each token's logprob kept; two files."""
    folder = tmp_path_factory.mktemp("odd")
    plain = write_jsonl(folder / "plain.jsonl", make_rows(20))
    return precompute_into(
        folder / "cache", model_dir, plain, write_jsonl(folder / "odd.jsonl", ODD_ROWS), per_token=True
    )


@pytest.fixture(scope="module")
def odd_page(odd_cache: Path) -> Path:
    return write_cache_page(read_cache(odd_cache), odd_cache.parent / "cache.html", Silent())


def shown(cache: Path, to: Path) -> Page:
    return Page(write_cache_page(read_cache(cache), to, Silent()).read_text(encoding="utf-8"))


# --- rows to look at ---


def test_sides_hash_alike_if_they_are_the_same_tokens_however_they_are_stored(odd_cache: Path) -> None:
    table = ReferenceCache(odd_cache).load().table
    hashes = suspects.look(table).sides
    sides = [[tuple(table[index].side(side)[0].tolist()) for side in (0, 1)] for index in range(len(table))]
    of = {tokens: hashes[index, side] for index, both in enumerate(sides) for side, tokens in enumerate(both)}
    assert len({*of.values()}) == len(of) < 2 * len(table)
    assert all(
        of[tokens] == hashes[index, side] for index, both in enumerate(sides) for side, tokens in enumerate(both)
    )


def test_differing_tokens_are_those_between_common_beginning_and_end(odd_cache: Path) -> None:
    table = ReferenceCache(odd_cache).load().table
    for index, found in enumerate(suspects.look(table).differing.tolist()):
        prefix, *lengths = table[index].lengths
        one, other = (table[index].side(side)[0][prefix:][::-1] for side in (0, 1))
        alike = 0
        while alike < min(lengths) and one[alike] == other[alike]:
            alike += 1
        assert found == max(lengths) - alike


def test_a_block_is_looked_at_as_its_parts_are(odd_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ReferenceCache(odd_cache).load().table
    whole = suspects.look(table)
    monkeypatch.setattr(suspects, "AT_ONCE", 5)
    parts = suspects.look(table)
    for name in ("sides", "differing", "sketch"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_agreeing_hashes_estimate_how_much_two_answers_share() -> None:
    """The sketch's agreement is the shingles' Jaccard similarity, within what 16 hashes can tell."""
    random = np.random.default_rng(0)
    similar, agreement = [], []
    for share in (0.0, 0.3, 0.6, 0.9, 1.0):
        for _ in range(40):
            one = random.integers(0, 5000, 200)
            other = np.where(np.arange(200) < 200 * share, one, random.integers(5000, 9000, 200))
            sketch = suspects.look(table_of([one, other])).sketch
            sets = [{tuple(ids[at : at + 4]) for at in range(197)} for ids in (one, other)]
            similar.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
            agreement.append((sketch[0] == sketch[1]).mean())
    means = np.array([similar, agreement]).reshape(2, 5, 40).mean(2)
    assert np.abs(means[0] - means[1]).max() < 0.06 and means[1, -1] == 1 and means[1, 0] == 0


def table_of(answers: list[np.ndarray]) -> PairTable:
    """Pairs of one prompt token, an answer that counts, and a rejected token that does not."""

    def pair(ids: np.ndarray) -> EncodedPair:
        mask = np.r_[0, np.ones(len(ids)), 0]
        return EncodedPair(np.r_[1, ids, 2], mask.astype(np.uint8), (1, len(ids), 1))

    return PairTable.from_pairs([pair(ids) for ids in answers], "int32")


def test_an_extreme_margin_is_one_far_from_the_others_in_their_own_measure() -> None:
    margins = np.random.default_rng(0).uniform(0.1, 0.5, 1000)
    margins[[7, 8, 9, 10]] = [-2, np.nan, 2, -0.4]
    assert suspects.perhaps_flipped(margins).tolist() == [7, 10]
    assert suspects.perhaps_flipped(margins * 1000).tolist() == [7, 10]
    assert not len(suspects.perhaps_flipped(margins + 10))  # below the others, but no preference for rejected
    assert not len(suspects.perhaps_flipped(np.r_[np.zeros(9), -5])) and not len(suspects.perhaps_flipped(np.zeros(0)))


def test_each_odd_row_is_found_with_its_file_and_line(odd_cache: Path) -> None:
    found = gather(read_cache(odd_cache), Silent()).suspects

    def where(rule: str) -> list[list[tuple[str, int]]]:
        return [[(Path(line.source).name, line.line) for line in row.lines] for row in found.rows[rule]]

    assert where("contradicting") == [[("odd.jsonl", 1), ("odd.jsonl", 2)]]
    assert sorted(where("nearly-identical")) == [[("odd.jsonl", 3)], [("odd.jsonl", 6)]]
    assert where("near-duplicates") == [[("odd.jsonl", 4), ("odd.jsonl", 5)]]
    assert found.unread == 0 and not found.damage


def test_no_row_is_suspect_among_plain_ones(ref_cache: Path, tmp_path: Path) -> None:
    found = gather(read_cache(ref_cache), Silent()).suspects
    assert found.found["contradicting"] == found.found["nearly-identical"] == found.found["near-duplicates"] == 0


# --- figures and texts ---


def test_groups_hold_each_scored_pair_once_and_count_as_the_columns_do(odd_cache: Path) -> None:
    report = gather(read_cache(odd_cache), Silent())
    table, scores = ReferenceCache(odd_cache).load()
    for groups in report.groups.values():
        assert sum(group.pairs for group in groups) == len(table)
        share = sum(group.by_mean * group.pairs for group in groups) / len(table)
        assert share == pytest.approx((scores.logp_mean[:, 0] > scores.logp_mean[:, 1]).mean())
    plain = report.groups["file"][0]
    margins = scores.logp_mean[table.source[:, 0] == 0] @ np.array([1, -1])
    assert plain.pairs == 20 and plain.margin == pytest.approx(margins.mean(), abs=1e-6)
    assert all(len(lines) == EXTREMES for lines in report.extremes.values())


def test_texts_are_the_pairs_token_by_token_with_their_logprobs(odd_cache: Path) -> None:
    cache = ReferenceCache(odd_cache)
    tokenizer = ChatTokenizer.load(cache.tokenizer_dir)
    texts = pair_texts(cache, tokenizer, list(range(cache.log.pairs)))
    for index, (shared, *own) in texts.items():
        pair, means = cache.blocks.pair(index)
        for side in (0, 1):
            ids, mask = pair.side(side)
            pieces = [*shared, *own[side]]
            if len(ids) <= OWN_SHOWN:
                assert "".join(text_of(piece) for piece in pieces) == visible(tokenizer.decode(ids))
                assert means is not None
                total = sum(piece[1] for piece in map(inside, pieces) if isinstance(piece, list))
                assert total == pytest.approx(float(means[side]) * mask.sum(), abs=2e-3 * len(pieces))
    longest, left_out = next((own, own[0][-1]) for _, *own in texts.values() if isinstance(own[0][-1], int))
    assert isinstance(left_out, int) and left_out > 0 and "word" in "".join(map(text_of, longest[0][:-1]))


def inside(piece: Piece) -> Plain | int:
    return piece["special"] if isinstance(piece, dict) else piece


def text_of(piece: Piece) -> str:
    found = inside(piece)
    assert not isinstance(found, int)
    return found if isinstance(found, str) else str(found[0])


# --- the page ---


def test_a_page_is_sound_and_asks_nothing_of_any_network(odd_page: Path, tmp_path: Path) -> None:
    Page(odd_page.read_text(encoding="utf-8")).check()
    run = make_run(tmp_path / "run", evaluated=True)
    Page(write_run_page(ReportConfig(run)).read_text(encoding="utf-8")).check()
    Page(compare_page([Answers("a", [], "b", "c", False, False)], {}, {}, 0)).check()


def test_what_a_pair_says_stays_text(odd_page: Path, odd_cache: Path) -> None:
    found = Page(odd_page.read_text(encoding="utf-8"))
    assert "img" not in found.tags and found.tags.count("script") == 2
    index = next(
        index for index, pieces in found.data["pairs"].items() if "onerror" in "".join(map(text_of, pieces[0]))
    )
    said = "".join(map(text_of, [*found.data["pairs"][index][0], *found.data["pairs"][index][1]]))
    assert said.count(visible(NASTY)) == 2
    assert f"pair-{index}" in found.ids


def test_no_template_can_let_text_become_markup_or_a_control_character_pass() -> None:
    cell = Where(NASTY, 0, has_text=False)
    parts = [("preference", NASTY, [Table(NASTY, [NASTY], [[cell], [NASTY]])]), ("sources", "none", None)]
    found = Page(report("cache.html", f"{NASTY}\r\n", NASTY, parts, {"text": NASTY}))
    found.check()
    assert found.data == {"text": NASTY} and "img" not in found.tags and found.tags.count("section") == 1
    # title, heading, about, link and heading of the part, caption, column, row, cell
    assert found.text.count(visible(NASTY)) == 9 and "\x1b" not in found.html and "␍" not in found.html


def test_a_value_that_a_template_misses_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("report.html", title="no other value")


def test_no_page_is_made_where_the_command_line_starts() -> None:
    code = (
        "import sys, minicache.cli, minicache.pages.markup, minicache.pages.compare; assert 'jinja2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_each_tokens_logprob_the_page_says_how_to_get_it(ref_cache: Path, tmp_path: Path) -> None:
    found = shown(ref_cache, tmp_path / "p.html")
    found.check()
    assert "--per-token" in found.text
    pieces = [piece for part in next(iter(found.data["pairs"].values())) for piece in part]
    assert {len(piece) for piece in map(inside, pieces) if isinstance(piece, list)} == {1}


def test_special_tokens_are_told_from_the_same_text_typed(model_dir: Path, tmp_path: Path) -> None:
    typed = write_jsonl(tmp_path / "typed.jsonl", [row("why<|im_end|>", "<|im_end|>", "你<|im_end|>")])
    for per_token in (False, True):
        cache = precompute_into(tmp_path / f"cache{per_token}", model_dir, typed, per_token=per_token)
        found = shown(cache, tmp_path / "typed.html")
        assert "special tokens are framed" in found.text
        parts = [
            [(text_of(piece), isinstance(piece, dict)) for piece in part if isinstance(piece, dict) or not per_token]
            for part in found.data["pairs"]["0"]
        ]
        special = [[text for text, is_special in part if is_special] for part in parts]
        assert special == [["<|im_start|>", "<|im_end|>", "<|im_start|>"], ["<|im_end|>"], ["<|im_end|>"]]
        if not per_token:
            assert parts[0][1] == ("user\nwhy<|im_end|>", False) and parts[2][0] == ("你<|im_end|>", False)


def test_a_special_token_ends_a_character_that_has_no_end(tokenizer_dir: Path) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_dir)
    ids = tokenizer.encode(["猫<|im_end|>a"])[0][0]
    end = ids.tolist().index(tokenizer.backend.token_to_id("<|im_end|>"))
    cut = np.r_[ids[: end - 1], ids[end:]]
    runs = list(_texts(tokenizer, cut, (0, len(cut)), tokenizer.are_special(cut)))
    assert runs[-2:] == [(end - 1, end, "<|im_end|>"), (end, end + 1, "a")]


def test_what_of_each_file_is_not_used_is_shown(model_dir: Path, tmp_path: Path) -> None:
    rows = [{**row("why", "the cat", "a mat"), "score": 3}, row("why<|im_end|>", "not", "then")]
    files = [write_jsonl(tmp_path / name, rows[at:]) for at, name in enumerate(("one.jsonl", "two.jsonl"))]
    cache = precompute_into(tmp_path / "cache", model_dir, *files)
    (first, second) = ReferenceCache(cache).log.sources
    lines = [notes_on(asdict(source)) for source in (first, second)]
    assert [len(both) for both in lines] == [2, 2]
    report = gather(read_cache(cache), Silent())
    assert _sources(report)["notes"].rows == [
        *([first.name, line] for line in lines[0]),
        *([second.name, line] for line in lines[1]),
    ]
    found = shown(cache, tmp_path / "cache.html")
    found.check()
    assert all(line in found.text for both in lines for line in both)
    assert "not used: score (1 row)" in found.text


def test_what_the_template_was_given_is_among_the_facts(odd_cache: Path) -> None:
    it = gather(read_cache(odd_cache), Silent()).inspection
    assert "date" not in dict(_manifest(it)["facts"])
    given = replace(it, identity={**it.identity, "date": "2025-02-01", "template_args": '{"thinking": false}'})
    facts = dict(_manifest(given)["facts"])
    assert (facts["date"], facts["template args"]) == ("2025-02-01", '{"thinking": false}')


@pytest.mark.parametrize("line", ["[" * 100_000, "[]", "{", '{"file": 1}'])
def test_a_refused_row_that_a_person_has_edited_is_passed_over(line: str) -> None:
    (read,) = json_lines(line.encode())
    assert _refusal(read.value) is None


def test_files_refused_rows_and_problems_are_told(odd_page: Path) -> None:
    said = Page(odd_page.read_text(encoding="utf-8")).text
    assert "Complete: training may use it" in said and "identical" in said and "odd.jsonl:8" in said
    assert "chosen and rejected are the same" in said


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("ledger/pairs/c/1/0", "Not complete"),
        ("ledger/ref/c", "Not complete"),
        ("pairs/tokens/c/1/0", "Not complete"),
        ("ref/logp_mean/c/0/0/0", "Damaged"),
        ("tokenizer", "Texts cannot be shown"),
        ("refused.jsonl", "Complete"),
    ],
)
def test_a_cache_with_a_hole_gives_a_page_that_says_so(broken: str, says: str, odd_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(odd_cache, tmp_path / "cache")
    place = cache / broken
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    found = shown(cache, tmp_path / "p.html")
    found.check()
    assert says in found.text


@pytest.mark.parametrize("array", ["pairs/tokens", "ref/token_logps"])
def test_a_changed_byte_is_told_as_damage(array: str, odd_cache: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(odd_cache, tmp_path / "cache")
    chunk = cache / array / "c/1/0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    found = shown(cache, tmp_path / "p.html")
    found.check()
    assert "Damaged: training refuses it" in found.text and "block 1" in found.text
    assert ("8 pairs were not compared" in found.text) == (array == "pairs/tokens")


def test_what_is_looked_at_ends_somewhere_and_the_page_says_where(
    odd_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicache.pages.cache_report.MOST_TOKENS", 500)
    monkeypatch.setattr("minicache.pages.cache_rows.MOST_TOKENS", 500)
    assert "only the first 500 tokens of a cache are" in shown(odd_cache, tmp_path / "p.html").text


def test_many_files_are_not_all_listed(odd_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cache_report", "cache"):
        monkeypatch.setattr(f"minicache.pages.{module}.MOST_FILES", 1)
    found = shown(odd_cache, tmp_path / "p.html")
    assert "The first 1 of 2 files" in found.text


# --- charts ---


def test_a_chart_draws_each_value_within_its_frame_and_lists_it() -> None:
    values = [1.0, float("nan"), -3.0, 2e-5, 250.0]
    chart = curves("Loss", "nats", [Line("training", "", [0, 1, 2, 3, 9], values)], level=0.5)
    assert len(chart.dots) == 4 and len(chart.curves) == 1 and "from 1 to 250" in chart.description
    assert [row[1] for row in chart.numbers.rows] == ["1", "nan", "-3", "2e-05", "250"]
    bars = histogram("Lengths", "tokens", [0.5, 3.5, 6.5], [Bars("chosen", "chosen", [2, 0])], whole=True)
    assert len(bars.bars) == 1 and bars.numbers.rows == [["from 1", "2"], ["from 4", "0"]]
    assert "2 pairs" in bars.description
    for drawn in (chart, bars, curves("One", "", [Line("a", "", [3], [0.0])])):
        heights = [y for line in drawn.lines for y in (line[1], line[3])]
        heights += [dot[1] for dot in drawn.dots] + [label[1] for label in drawn.labels]
        assert all(0 <= height <= HEIGHT for height in [*heights, *(y + high for _, y, _, high, _ in drawn.bars)])


@pytest.mark.parametrize("scale", [1.0, 1e-7, -0.000123, 123456.7, -1e9])
def test_the_name_beside_a_chart_stands_clear_of_its_numbers(scale: float) -> None:
    chart = curves("t", "nats per token", [Line("a", "", [0, 1, 2], [scale, 1.1 * scale, 1.3 * scale])])
    beginnings = [x - 7 * len(text) for x, _, anchor, text in chart.labels if anchor == "end"]
    # the name is turned, and as wide as its letters are high
    assert min(beginnings) >= chart.beside_at[0] + 6
    assert all(float(point.split(",")[0]) > min(beginnings) for points, _ in chart.curves for point in points.split())


def test_every_shape_of_a_chart_reaches_the_page() -> None:
    lines = [Line("a", "chosen", [0, 1], [0.0, 1.0]), Line("b", "rejected", [0, 1], [1.0, 2.0])]
    charts = [curves("Loss", "nats", lines, level=0.5), histogram("x", "y", [-1, 0, 1], [Bars("c", "chosen", [2, 1])])]
    found = Page(report("run.html", "t", "a", [("curves", "Curves", {"from_ln_2": False, "charts": charts})]))
    found.check()
    for tag, count in {
        "circle": 4, "polyline": 2, "rect": 2, "line": sum(len(one.lines) for one in charts),
        "text": sum(len(one.labels) + 1 for one in charts),
    }.items():  # fmt: skip
        assert found.tags.count(tag) == count
    assert {"swatch chosen", "swatch rejected"} <= {attributes.get("class") for _, attributes in found.attributes}


def test_thinning_keeps_both_ends() -> None:
    assert thinned(list(range(1000)), 5) == [0, 250, 500, 749, 999] and thinned([1, 2], 5) == [1, 2]


# --- a run ---


def test_a_runs_page_tells_how_it_went_and_what_was_asked(tmp_path: Path) -> None:
    outcome = {"model_step": 2, "stopped": "no gain for 2 validations", "progress": {"step": 4}}
    run = make_run(
        tmp_path / "run", 9, evaluated=True, beta=0.7, lr=1e-5, pairs=40, held_out=8, handshake=2e-7,
        started_from="org/model", outcome=outcome,
    )  # fmt: skip
    said = Page(write_run_page(ReportConfig(run)).read_text(encoding="utf-8")).text
    for expected in (
        "Stopped after step 4: no gain for 2 validations", "the best one, after step 2", "org/model",
        "within 2e-07 nats", "40 trained on, 8 held out", "--beta", "0.7", "step 2 (saved)", "step 0 (before)",
    ):  # fmt: skip
        assert expected in said


def test_a_run_that_goes_on_or_has_lost_its_options_still_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    assert "Not finished: last logged after step 2" in Page(write_run_page(ReportConfig(run)).read_text()).text
    (run / "run.json").unlink()
    found = Page(write_run_page(ReportConfig(run / "metrics.jsonl")).read_text())
    found.check()
    assert "run.json is missing" in found.text


def test_where_it_started_is_linked_where_that_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, cache = make_run(Path("über 1"), steps=1), Path("cache")
    write_run_page(ReportConfig(before))
    cache.mkdir()
    (cache / "report.html").touch()
    run = make_run(Path("run 2"), steps=1, started_from=str(before / "model"), ref_cache="cache")
    links = Page(write_run_page(ReportConfig(run)).read_text(encoding="utf-8")).links
    assert {"../%C3%BCber%201/report.html", "../cache/report.html"} < set(links)


def test_answers_stand_side_by_side_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    lines: list[Row] = [
        {"prompt": NASTY, "reference": NASTY, "policy": "", "reference_cut": True, "policy_cut": False,
         "models": {"reference": "r", "policy": str(run / "model")}},
        {"prompt": "why", "reference": "a", "policy": "b" * 9000},
    ]  # fmt: skip
    write_jsonl(run / "answers.jsonl", lines)
    found = Page(write_run_page(ReportConfig(run)).read_text(encoding="utf-8"))
    found.check()
    assert "img" not in found.tags and found.text.count(visible(NASTY)) == 2
    assert (
        "(no answer)" in found.text
        and "3,000 characters left out" in found.text
        and "not of this run" not in found.text
    )
    other = write_jsonl(tmp_path / "other.jsonl", [{**lines[0], "models": {"policy": "elsewhere"}}])
    asked = ReportConfig(run, tmp_path / "p.html", other)
    assert "These answers are of elsewhere" in Page(write_run_page(asked).read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a"}\n',
        "[1]\n",
        "{",
        '{"prompt": "a", "reference": "b", "policy": 3',
        '{"prompt": "a", "reference": "b", "policy": "c", "models": 3}',
    ],
)
def test_answers_of_another_kind_are_refused_with_their_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: expected an object with 'prompt'"):
        write_run_page(ReportConfig(make_run(tmp_path / "run"), answers=tmp_path / "a.jsonl"))


# --- the command line ---


def test_the_columns_of_a_cache_are_read_once_for_screen_and_page(
    ref_cache: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    plain = BoundedStore.get

    async def get(store: BoundedStore, key: str, *more: Any, **options: Any) -> Any:
        reads[key] += 1
        return await plain(store, key, *more, **options)

    monkeypatch.setattr(BoundedStore, "get", get)
    assert cli("inspect-cache", ref_cache, "--html", tmp_path / "c.html")[0] == 0
    chunks = {name: [count for key, count in reads.items() if key.startswith(f"{name}/c/")] for name in READ}
    assert chunks == {name: [1] * 5 for name in READ}


def test_both_commands_write_their_page_and_name_it(cli: Cli, odd_cache: Path, tmp_path: Path) -> None:
    code, said, _ = cli("inspect-cache", odd_cache, "--html", tmp_path / "c.html")
    assert code == 0 and "c.html" in said and Page((tmp_path / "c.html").read_text(encoding="utf-8")).data["pairs"]
    code, said, told = cli("inspect-cache", odd_cache, "--html", tmp_path / "c.html", "--json")
    assert code == 0 and json.loads(said)["pairs"] == 27 and "c.html" in told
    run = make_run(tmp_path / "run")
    assert cli("report", run)[0] == 0 and (run / "report.html").is_file()
    code, _, told = cli("report", tmp_path)
    assert code == 1 and "holds runs and is none itself" in " ".join(told.split())


def test_a_page_is_of_the_whole_cache() -> None:
    with pytest.raises(ConfigError, match="--html: shows the whole cache"):
        InspectConfig("c", pair=1, html=Path("p.html"))
