"""Two caches side by side: what differs is named, what is alike is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import RefBlock
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheNotFound, ConfigError
from minicache.stages.diff import diff
from tests.conftest import Cli, make_rows, precompute_into, tiny_llama, write_jsonl


def test_a_cache_and_its_copy_do_not_differ(ref_cache: Path, tmp_path: Path) -> None:
    shutil.copytree(ref_cache, tmp_path / "copy")
    report = diff(ref_cache, tmp_path / "copy")
    assert not report.identity and (report.a.only, report.b.only) == (0, 0)
    assert report.shared and (report.shared.pairs, report.shared.flipped) == (40, 0)
    assert {spread.largest for spread in report.shared.differences.values()} == {0} and not report.shared.farthest
    (file,) = report.files
    assert file.kept == (40, 40)


def test_pairs_are_found_again_wherever_they_lie(ref_cache: Path, model_dir: Path, tmp_path: Path) -> None:
    rows = [*make_rows(3, seed=8), *reversed(make_rows(40)[25:])]
    other = precompute_into(tmp_path / "b", model_dir, write_jsonl(tmp_path / "b.jsonl", rows), block_pairs=4)
    report = diff(ref_cache, other)
    assert (report.a.only, report.b.only) == (25, 3)
    assert report.shared and report.shared.pairs == 15
    assert report.shared.differences["margin"].largest < 1e-5  # another batch, another order of sums
    assert [(each.field, each.changes_values) for each in report.identity] == [("block_pairs", False)]
    assert sorted((Path(file.name).name, file.kept) for file in report.files) == [
        ("b.jsonl", (None, 18)),
        ("pairs.jsonl", (40, None)),
    ]


def test_values_that_differ_are_measured_and_their_pairs_named(ref_cache: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(ref_cache, changed)
    writer = CacheWriter(changed)
    scores = writer.blocks.ref(1)
    means = scores.logp_mean.copy()
    means[3] = means[3, ::-1] - [0, 0.5]  # the reference prefers the other side
    writer.write_ref(1, RefBlock(means, scores.token_count))
    report = diff(ref_cache, changed)
    before = ReferenceCache(ref_cache).load().reference.logp_mean[11].astype(float)
    after = np.array([before[1], before[0] - 0.5])
    assert report.shared and report.shared.flipped == 1
    (pair,) = report.shared.farthest
    assert pair.line == 12 and pair.digest == ReferenceCache(ref_cache).load().table[11].digest.hex()
    np.testing.assert_allclose(pair.logps_b, after, atol=1e-6)
    spreads = report.shared.differences
    assert spreads["chosen"].largest == pytest.approx(abs(before[0] - after[0]), abs=1e-6)
    assert spreads["rejected"].mean == pytest.approx(abs(before[1] - after[1]) / 40, abs=1e-6)


def test_another_model_is_named_in_words_and_as_json(
    ref_cache: Path, model_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    tiny_llama(seed=5).save_pretrained(tmp_path / "model")
    for file in model_dir.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    other = precompute_into(tmp_path / "b", tmp_path / "model", write_jsonl(tmp_path / "b.jsonl", make_rows(40)))
    code, shown, _ = cli("diff", ref_cache, other)
    assert code == 0 and any(line.split()[:1] == ["weights"] and "yes" in line for line in shown.splitlines())
    code, text, _ = cli("diff", ref_cache, other, "--json")
    report = json.loads(text)
    assert code == 0 and report["shared"]["pairs"] == 40 and report["identity"][0][0] == "weights"
    assert report["shared"]["differences"]["chosen"]["largest"] > 0.01 and len(report["shared"]["farthest"]) == 5


def test_what_cannot_be_read_is_left_out_and_told(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(ref_cache, tmp_path / "holed")
    shutil.rmtree(tmp_path / "holed" / "ledger" / "ref" / "c" / "2")
    report = diff(ref_cache, tmp_path / "holed")
    assert report.b.unreadable == [2] and (report.a.only, report.b.only) == (8, 0)
    _, shown, _ = cli("diff", ref_cache, tmp_path / "holed")
    assert "blocks not looked at" in shown
    with pytest.raises(CacheNotFound):
        diff(ref_cache, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="an empty one"):
        diff(ref_cache, "")
