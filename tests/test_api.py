"""The Python API: positions and digests lead to the same pairs as the blocks hold; the page's own example runs."""

import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import minicache
from minicache import EncodedPair, ReferenceCache, ScoredPair
from minicache.errors import CacheDamaged, CacheError, CacheIncomplete
from tests.conftest import make_rows, precompute_into, write_jsonl

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def same(left: ScoredPair, right: ScoredPair) -> bool:
    return left.pair.digest == right.pair.digest and np.array_equal(left.logp_mean, right.logp_mean)


def test_by_position_in_order_and_backwards(ref_cache: Path) -> None:
    cache = ReferenceCache.open(ref_cache)
    table, reference = cache.load()
    assert len(cache) == 40 and cache.complete
    for index, scored in enumerate(cache):
        assert scored.index == index and isinstance(scored.pair, EncodedPair)
        assert scored.pair.digest == table[index].digest and scored.pair.source == table[index].source
        assert np.array_equal(scored.pair.tokens, table[index].tokens)
        assert np.array_equal(scored.logp_mean, reference.logp_mean[index])
        assert np.array_equal(scored.token_count, table.token_counts[index])
        assert np.allclose(scored.logp_sum / scored.token_count, scored.logp_mean)
        assert scored.file.endswith("pairs.jsonl") and scored.line == index + 1 and scored.token_logps is None
    assert index == 39
    for index in (17, 3, 39, 0, 8, 7):
        assert same(cache[index], cache[index - 40]) and cache[index].pair.digest == table[index].digest
    for index in (40, -41):
        with pytest.raises(IndexError, match="numbered from 0"):
            cache[index]


def test_by_digest(ref_cache: Path) -> None:
    cache = ReferenceCache.open(ref_cache)
    for index in (0, 25, 39):
        digest = cache[index].pair.digest
        assert cache.find(digest) == cache.find(digest.hex()) == index
        assert digest in cache and digest.hex() in cache
    for absent in (bytes(16), b"\xff" * 16, "00" * 16):
        assert cache.find(absent) is None and absent not in cache
    assert 7 not in cache
    for wrong in (b"short", "no hex", None):
        with pytest.raises(ValueError, match="expected a digest"):
            cache.find(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a position"):
        cache[1:3]  # type: ignore[index]


def test_everything_at_once(ref_cache: Path) -> None:
    import torch

    cache = ReferenceCache.open(ref_cache)
    arrays, tensors = cache.to_numpy(), cache.to_torch()
    names = {"tokens", "loss_mask", "lengths", "digest", "source", "offsets", "logp_mean", "token_count"}
    assert arrays.keys() == tensors.keys() == names
    for name, array in arrays.items():
        tensor = tensors[name].numpy()
        assert np.array_equal(tensor.view(np.uint64) if name == "digest" else tensor, array), name
    assert tensors["tokens"].dtype == torch.int32 and arrays["tokens"].dtype == np.uint16
    start, stop = arrays["offsets"][5:7]
    assert np.array_equal(arrays["tokens"][start:stop], cache[5].pair.tokens)


def test_the_logprob_of_each_token(tmp_path: Path, model_dir: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(10))
    cache = ReferenceCache.open(precompute_into(tmp_path / "cache", model_dir, data, per_token=True))
    assert "token_logps" in cache.to_numpy()
    for scored in cache:
        assert scored.token_logps is not None
        prefix, chosen, _ = scored.pair.lengths
        for side, own in enumerate((slice(prefix, prefix + chosen), slice(prefix + chosen, None))):
            total = np.nansum(scored.token_logps[:prefix]) + np.nansum(scored.token_logps[own])
            assert total == pytest.approx(scored.logp_sum[side], abs=1e-4)


def test_what_is_not_whole_raises(ref_cache: Path, tmp_path: Path) -> None:
    for what, error in (
        ("ledger/ref", CacheIncomplete),
        ("ledger/pairs", CacheIncomplete),
        ("pairs/tokens", CacheDamaged),
    ):
        holed = shutil.copytree(ref_cache, tmp_path / what)
        shutil.rmtree(holed / what / "c" / "2")
        cache = ReferenceCache.open(holed)
        assert cache.complete == (what == "pairs/tokens"), "the ledger cannot know of lost tokens"
        if what != "ledger/pairs":
            assert len(list(islice(cache, 16))) == 16
        with pytest.raises(error):
            list(cache)
        with pytest.raises(CacheError):
            cache.to_numpy()


def test_a_cache_shows_what_the_page_names_and_little_more(ref_cache: Path) -> None:
    cache = ReferenceCache.open(ref_cache)
    documented = set(re.findall(r"`(?:cache|ReferenceCache)\.(\w+)", PAGE.read_text(encoding="utf-8")))
    inside = {"blocks", "check_complete", "contents", "load", "path", "place", "tokenizer_dir"}
    assert {name for name in dir(cache) if name[0] != "_"} == documented | inside


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, minicache; assert 'numpy' not in sys.modules; "
        "from minicache import ReferenceCache; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(minicache.__all__) == minicache.PLACES.keys()
    with pytest.raises(AttributeError, match="no attribute 'Cache'"):
        minicache.Cache  # noqa: B018


def test_the_page_s_example_runs(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text(encoding="utf-8")
    (tmp_path / "cache").symlink_to(ref_cache)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert isinstance(names["first"], ScoredPair)
    for name in re.findall(r"`(?:cache|ReferenceCache)\.(\w+)", page):
        assert hasattr(names["cache"], name), name
