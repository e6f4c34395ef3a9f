"""How rows become pairs, as the cache's log holds it: options, rows that are left aside, several pairs of a row."""

import json
import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from minicache.cache.manifest import Source
from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.data.columns import Reading
from minicache.data.files import DataFile
from minicache.data.sampling import bounds, within
from minicache.errors import CacheMismatch, ConfigError, DataError
from minicache.options.others import MergeConfig
from minicache.options.stage_one import PrecomputeConfig
from minicache.reports.notes import RENDERED, notes_on
from minicache.stages.merge import merge
from minicache.trackers import Silent
from tests.cache.test_cache import flip
from tests.conftest import Cli, Row, make_rows, precompute_into, write_jsonl
from tests.helpers.stores import assert_same_store


def source_of(cache: Path) -> Source:
    (source,) = ReferenceCache(cache).log.sources
    return source


def pair_row(number: int, **others: Any) -> Row:
    return {"prompt": f"Why {number}?", "chosen": "So.", "rejected": "No.", **others}


def test_columns_that_nothing_reads_are_counted_and_shown(model_dir: Path, tmp_path: Path, cli: Cli) -> None:
    rows = [pair_row(n, id=n, score=2.5) for n in range(3)] + [pair_row(3, id=None, source="x")]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = source_of(precompute_into(tmp_path / "cache", model_dir, data))
    assert source.unused == {"id": 3, "score": 3, "source": 1}
    assert "not used: id (3 rows), score (3 rows), source (1 row)" in notes_on(asdict(source))
    _, shown, _ = cli("inspect-cache", tmp_path / "cache")
    assert "not used: id (3 rows)" in shown


def test_what_a_model_is_meant_to_see_is_refused_unless_it_is_ignored(model_dir: Path, tmp_path: Path) -> None:
    rows = [pair_row(1), pair_row(2, context="It rained."), pair_row(3, images=["a.png"]), pair_row(4, context="")]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = source_of(precompute_into(tmp_path / "cache", model_dir, data))
    assert source.refused == {"unused-field": 1, "media": 1} and source.kept == 2
    listed = [json.loads(line) for line in (tmp_path / "cache" / "refused.jsonl").read_text().splitlines()]
    assert [(row["line"], "--ignore-fields" in row["message"]) for row in listed] == [(2, True), (3, True)]
    ignoring = precompute_into(tmp_path / "all", model_dir, data, ignore_fields="context, images")
    assert source_of(ignoring).kept == 4 and not source_of(ignoring).refused
    assert notes_on(asdict(source_of(ignoring)))[0] == "read with --ignore-fields context, images"


def test_a_file_is_read_again_with_the_same_options_only(model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"ask": f"{n}?", "good": "a", "bad": "b"} for n in range(4)])
    names = "prompt=ask,chosen=good,rejected=bad"
    cache = precompute_into(tmp_path / "cache", model_dir, data, columns=names)
    assert source_of(cache).reading == {"columns": names} and source_of(cache).kept == 4
    precompute_into(cache, model_dir, data, columns=names)
    for others in ({}, {"columns": names, "limit": 2}):
        with pytest.raises(CacheMismatch, match=f"was read with --format auto --columns {names}, asked for"):
            precompute_into(cache, model_dir, data, **others)


RANKED = [
    {"prompt": f"Why {n}?", "answers": [{"answer": text, "rank": rank} for rank, text in enumerate(texts, start=1)]}
    for n, texts in enumerate([("a", "b", "c"), ("a", "b", "b"), ("x", "y", "z")])
]


def test_a_row_gives_several_pairs_each_once(model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", RANKED)
    cache = precompute_into(tmp_path / "cache", model_dir, data, row_pairs="all", block_pairs=2)
    source = source_of(cache)
    # "a" over "b" twice in the second row, and "b" over "b" not at all
    assert (source.rows, source.kept, source.duplicates) == (3, 7, 1)
    flip(cache / "pairs/tokens/c/1/0")
    precompute_into(cache, model_dir, data, row_pairs="all", block_pairs=2)
    assert_same_store(cache, precompute_into(tmp_path / "other", model_dir, data, row_pairs="all", block_pairs=2))
    with pytest.raises(DataError, match="several-answers: the row ranks 3 answers; expected --pairs best-worst"):
        precompute_into(tmp_path / "none", model_dir, data)


def test_a_tie_is_no_fault_of_a_row(model_dir: Path, tmp_path: Path) -> None:
    row = {"prompt": "Why?", "response_1": "a", "response_2": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [{**row, "preference_strength": n} for n in (0, 2)])
    source = source_of(precompute_into(tmp_path / "cache", model_dir, data, on_bad_row="fail"))
    assert source.refused == {"tie": 1} and source.kept == 1


def test_contents_that_look_rendered_are_pointed_out(model_dir: Path, tmp_path: Path) -> None:
    rows = [pair_row(n) for n in range(20)]
    rows[6]["chosen"] = "So<|im_end|>."
    source = asdict(source_of(precompute_into(tmp_path / "one", model_dir, write_jsonl(tmp_path / "one.jsonl", rows))))
    assert source["noted"] == {"special-text": 1} and source["example"] == "line 7: <|im_end|>"
    assert RENDERED not in notes_on(source)
    for row in rows:
        row["prompt"] = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    source = asdict(source_of(precompute_into(tmp_path / "all", model_dir, write_jsonl(tmp_path / "all.jsonl", rows))))
    assert notes_on(source)[-1] == RENDERED


# --- some of the rows ---


def test_a_limit_is_of_all_files_together_and_a_repeated_call_goes_on(model_dir: Path, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", make_rows(6, seed=n)) for n in range(3)]
    cache = precompute_into(tmp_path / "cache", model_dir, *files, limit=8, block_pairs=2)
    assert [source.rows for source in ReferenceCache(cache).log.sources] == [6, 2, 0]
    flip(cache / "pairs/tokens/c/3/0")
    precompute_into(cache, model_dir, *files, limit=8, block_pairs=2)
    assert len(ReferenceCache(cache).load().table) == 8


def test_a_sample_is_the_same_in_any_order(tmp_path: Path) -> None:
    rows = make_rows(60)
    mixed = random.Random(1).sample(rows, 60)
    whole = [DataFile("a", write_jsonl(tmp_path / "a", rows))]
    parts = [
        DataFile(name, write_jsonl(tmp_path / name, some)) for name, some in (("b", mixed[:13]), ("c", mixed[13:]))
    ]

    def sampled(files: list[DataFile], seed: int = 0) -> list[str]:
        reading = Reading(sample=20, sample_seed=seed)
        found = []
        for file, bound in zip(files, bounds(files, reading), strict=True):
            numbered = enumerate((json.loads(line) for line in file.path.read_text().splitlines()), start=1)
            found += [json.dumps(row) for _, row in within(numbered, bound, seed)]
        return sorted(found)

    assert len(sampled(whole)) == 20
    assert sampled(whole) == sampled(parts)
    assert sampled(whole) != sampled(whole, seed=1)


def test_rows_that_repeat_another_do_not_fill_a_sample(tmp_path: Path) -> None:
    rows = make_rows(12)
    files = [DataFile("a", write_jsonl(tmp_path / "a", rows + rows[:5] * 20))]
    (bound,) = bounds(files, Reading(sample=8))
    assert len({json.dumps(row) for _, row in within(enumerate(rows * 2), bound, 0)}) == 8


def test_a_sample_of_more_than_all_is_all_and_another_one_is_refused(model_dir: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    cache = precompute_into(tmp_path / "cache", model_dir, data, sample=5)
    assert source_of(cache).rows == source_of(cache).kept == 5
    precompute_into(cache, model_dir, data, sample=5)
    with pytest.raises(
        CacheMismatch, match="was read with --format auto --sample 5, asked for --format auto --sample 6"
    ):
        precompute_into(cache, model_dir, data, sample=6)
    assert source_of(precompute_into(tmp_path / "all", model_dir, data, sample=50)).rows == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 3, "sample": 3}, "one of the two"),
        ({"sample_seed": 3}, "--sample-seed: is the seed of --sample"),
        ({"columns": "prompt"}, "--columns prompt: expected NAME=COLUMN"),
        ({"columns": "a=b,a=c"}, "each name once"),
        ({"template_arg": ("x",)}, "--template-arg x: expected NAME=VALUE"),
        ({"template_arg": ("tools=1",)}, "expected NAME=VALUE"),
        ({"date": "tomorrow"}, "--date tomorrow: expected a date like"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_file(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrecomputeConfig("m", ("f",), Path("c"), **options)


STRANGE = ({"limit": "x"}, {"limit": ""}, {"newer": "yes"}, {"columns": "a=b", "sample_seed": "[1]"})


@pytest.mark.parametrize("reading", STRANGE, ids=repr)
def test_options_of_a_newer_release_or_of_a_stranger_are_compared_as_they_are(
    model_dir: Path, tmp_path: Path, reading: dict[str, str]
) -> None:
    one, other = (
        write_jsonl(tmp_path / f"{name}.jsonl", [pair_row(n, id=name) for n in numbers])
        for name, numbers in (("one", (1, 2)), ("other", (3, 4)))
    )
    cache = precompute_into(tmp_path / "cache", model_dir, one)
    writer = CacheWriter(cache)
    writer.log.sources[0].reading = reading
    writer.write_log()
    said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in reading.items())
    asked = f"was read with --format auto {said}, asked for --format auto. Ask for the same"
    with pytest.raises(CacheMismatch, match=re.escape(asked)):
        precompute_into(cache, model_dir, one)
    # It says nothing of other files.
    precompute_into(cache, model_dir, other)
    assert [source.kept for source in ReferenceCache(cache).log.sources] == [2, 2]
    plain = precompute_into(tmp_path / "plain", model_dir, one)
    merging = f"was read with --format auto, in another of the caches with --format auto {said}; expected"
    with pytest.raises(CacheMismatch, match=re.escape(merging)):
        merge(MergeConfig((cache, plain), tmp_path / "merged"), Silent())
