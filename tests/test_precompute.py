"""Stage one: values, resuming, appending, repairing, refusing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minicache.cache.reader import ReferenceCache
from minicache.config import PrecomputeConfig
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheDamaged, CacheMismatch, DataError, HandshakeError, ModelError, OutputError
from minicache.scoring import Scorer
from minicache.stages.precompute import PrecomputeReport, precompute
from minicache.trackers import Silent
from tests.conftest import make_rows, one_process, precompute_into, tiny_llama, write_jsonl
from tests.stores import assert_same_store, chunk_files, contents
from tests.test_cache import DAMAGE
from tests.test_scoring import plain_logps


def run(path: Path, model: Path, *data: Path, **options) -> PrecomputeReport:
    config = PrecomputeConfig(str(model), tuple(map(str, data)), path, **{"block_pairs": 8, **options})
    return precompute(config, one_process(), Silent())


def means(cache: Path) -> dict[bytes, np.ndarray]:
    table, scores = ReferenceCache(cache).load()
    return {digest.tobytes(): mean for digest, mean in zip(table.digest, scores.logp_mean, strict=True)}


def test_values_equal_the_plain_float64_computation(ref_cache: Path, model_dir: Path) -> None:
    """Row by row, no padding, float64 throughout: what every number in a cache means."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    table, scores = ReferenceCache(ref_cache).load()
    assert len(table) == 40
    for index in range(len(table)):
        sums, counts = plain_logps(model, table[index])
        assert scores.token_count[index].tolist() == counts
        assert np.abs(scores.logp_mean[index] - np.array(sums) / counts).max() < 1e-5


def test_the_answer_alone_counts_and_all_of_it(ref_cache: Path) -> None:
    tokenizer = ChatTokenizer.load(ReferenceCache(ref_cache).tokenizer_dir)
    table, _ = ReferenceCache(ref_cache).load()
    for index, row in enumerate(make_rows(40)):
        for side, name in enumerate(("chosen", "rejected")):
            ids, mask = table[index].side(side)
            assert tokenizer.decode(ids[mask == 1]) == row[name][-1]["content"] + "<|im_end|>\n"


@pytest.mark.parametrize("options", [{"tokens_per_batch": 1}, {"tokens_per_batch": 10**6}, {"block_pairs": 40}])
def test_how_pairs_are_batched_changes_no_value(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, options
) -> None:
    other = means(precompute_into(tmp_path / "cache", model_dir, data_file, **options))
    for digest, mean in means(ref_cache).items():
        assert np.abs(other[digest] - mean).max() < 1e-5


def test_per_token_values_have_the_stored_means(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    table, scores = ReferenceCache(precompute_into(tmp_path / "cache", model_dir, data_file, per_token=True)).load()
    assert np.array_equal(~np.isnan(scores.token_logps), table.loss_mask == 1)
    for index in range(len(table)):
        part = scores.token_logps[table.offsets[index] : table.offsets[index + 1]]
        prefix, chosen, _ = table.lengths[index]
        sides = part[: prefix + chosen], np.concatenate([part[:prefix], part[prefix + chosen :]])
        assert np.allclose([np.nanmean(side) for side in sides], scores.logp_mean[index], atol=1e-5)


def test_what_is_done_is_not_done_again(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    renamed = shutil.copy(data_file, tmp_path / "renamed.jsonl")
    before = contents(cache)
    for file in (data_file, renamed):
        report = run(cache, model_dir, file)
        assert report.scored == 0 and report.pairs == 40
    assert contents(cache) == before


def test_more_data_is_appended_and_only_that_is_scored(
    ref_cache: Path, model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    rows = make_rows(40)[5:25] + make_rows(12, seed=5)
    more = write_jsonl(tmp_path / "more.jsonl", [*rows, rows[-1]])
    scored = []
    forward = Scorer.forward
    monkeypatch.setattr(Scorer, "forward", lambda self, batch: scored.append(batch.pairs) or forward(self, batch))
    report = run(cache, model_dir, more)
    assert report.scored == 12 and report.pairs == 52
    assert sum(scored) == 12 + 8  # and the handshake with what was there
    assert (report.sources[1].rows, report.sources[1].kept, report.sources[1].duplicates) == (33, 12, 21)
    old, new = means(ref_cache), means(cache)
    assert len(new) == 52 and all(np.array_equal(new[digest], old[digest]) for digest in old)
    alone = means(
        precompute_into(tmp_path / "alone", model_dir, write_jsonl(tmp_path / "a.jsonl", make_rows(12, seed=5)))
    )
    assert all(np.abs(new[digest] - alone[digest]).max() < 1e-5 for digest in alone)
    assert not list(ReferenceCache(cache).verify())


def bad_rows() -> list[str]:
    good = [json.dumps(row) for row in make_rows(6, seed=3)]
    same = make_rows(1, seed=4)[0]
    return [
        good[0],
        "{broken",
        good[1],
        json.dumps({"chosen": []}),
        json.dumps({"prompt": "why", "chosen": "x", "rejected": 3}),
        json.dumps({"prompt": "why", "chosen": "not", "rejected": ""}),
        json.dumps({"chosen": same["chosen"], "rejected": same["chosen"]}),
        *good[2:],
        good[0],
    ]


REFUSED = {2: "broken-json", 4: "missing-field", 5: "wrong-type", 6: "empty-answer", 7: "identical"}


def test_bad_rows_are_skipped_counted_and_listed(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(bad_rows()))
    report = run(tmp_path / "cache", model_dir, file)
    (source,) = report.sources
    assert (source.rows, source.kept, source.duplicates) == (12, 6, 1)
    assert source.refused == dict.fromkeys(sorted(REFUSED.values()), 1)
    listed = [json.loads(line) for line in report.refused_file.read_text().splitlines()]
    assert {row["line"]: row["reason"] for row in listed} == REFUSED
    assert all(row["file"] == str(file) and row["message"] for row in listed)


def test_on_bad_row_fail_leaves_nothing_behind(ref_cache: Path, model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(bad_rows()))
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: broken-json"):
        run(tmp_path / "new", model_dir, file, on_bad_row="fail", block_pairs=1)
    assert [item.name for item in tmp_path.iterdir()] == ["mixed.jsonl"]
    old = shutil.copytree(ref_cache, tmp_path / "old")
    before = contents(old)
    with pytest.raises(DataError):
        run(old, model_dir, file, on_bad_row="fail")
    assert contents(old) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken\n" * 3, r"no row became a pair: 3 refused, the first at .*data\.jsonl:1: broken-json"),
        ("", "the file is empty"),
        ("\n \n", "holds no rows"),
    ],
)
def test_a_file_without_a_pair_makes_no_cache(model_dir: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "cache", model_dir, tmp_path / "data.jsonl")
    assert not (tmp_path / "cache").exists()


def test_truncation_is_counted_and_what_it_leaves_nothing_of_is_refused(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    report = run(tmp_path / "cache", model_dir, data_file, max_length=40)
    (source,) = report.sources
    table, _ = ReferenceCache(tmp_path / "cache").load()
    assert table.side_lengths.max() == 40 and source.truncated > 0
    assert source.refused["truncated-away"] > 0
    assert source.kept + sum(source.refused.values()) == 40


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("max_length", {"max_length": 64}),
        ("truncate", {"truncate": "left"}),
        ("loss_on", {"loss_on": "assistant"}),
        ("dtype", {"dtype": "bfloat16"}),
        ("per_token", {"per_token": True}),
        ("block_pairs", {"block_pairs": 4}),
    ],
)
def test_another_request_is_refused_with_the_field_named(
    ref_cache: Path, model_dir: Path, data_file: Path, field: str, options: dict
) -> None:
    with pytest.raises(CacheMismatch, match=rf"{field} is \S+, asked for {next(iter(options.values()))}"):
        run(ref_cache, model_dir, data_file, **options)


def test_other_weights_another_tokenizer_another_template_are_refused(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model_dir, tmp_path / "model")
    tiny_llama(seed=1).save_pretrained(other)
    with pytest.raises(CacheMismatch, match="weights is"):
        run(ref_cache, other, data_file)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(CacheMismatch, match="template is"):
        run(ref_cache, model_dir, data_file, chat_template=template)
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    changed = shutil.copytree(model_dir, tmp_path / "changed")
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CacheMismatch, match="tokenizer is"):
        run(ref_cache, model_dir, data_file, tokenizer=str(changed))


def test_block_size_comes_from_the_cache_when_not_asked_for(ref_cache: Path, model_dir: Path, data_file: Path) -> None:
    assert run(ref_cache, model_dir, data_file, block_pairs=None).scored == 0


def test_a_model_that_computes_otherwise_may_not_add_to_a_cache(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 17.0
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(HandshakeError):
        run(shutil.copytree(ref_cache, tmp_path / "cache"), model, data_file)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_same_command_repairs_any_damaged_chunk(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, damage: str
) -> None:
    for number, chunk in enumerate(chunk_files(ref_cache)[:: 3 if damage == "flip" else 7]):
        cache = shutil.copytree(ref_cache, tmp_path / str(number))
        DAMAGE[damage](cache / chunk.relative_to(ref_cache))
        run(cache, model_dir, data_file)
        assert_same_store(cache, ref_cache)


def test_damaged_pairs_whose_file_is_not_given_are_asked_for(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    (cache / "pairs" / "tokens" / "c" / "2" / "0").unlink()
    with pytest.raises(CacheDamaged, match=rf"block 2 .*add to --data: .*{data_file.name}"):
        run(cache, model_dir, write_jsonl(tmp_path / "other.jsonl", make_rows(3, seed=8)))
    run(cache, model_dir, data_file)
    assert_same_store(cache, ref_cache)


def test_no_finite_logprob_no_entry(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = float("nan")
    broken = shutil.copytree(model_dir, tmp_path / "model")
    model.save_pretrained(broken)
    with pytest.raises(ModelError, match=rf"no finite logprob for \d+ pairs, the first from {data_file}:\d+"):
        run(tmp_path / "cache", broken, data_file)
    cache = ReferenceCache(tmp_path / "cache")
    assert all(
        np.isfinite(cache.ref(block).logp_mean).all() for block in range(5) if block not in cache.unfinished("ref")
    )


def test_a_tokenizer_of_another_model_is_refused(tokenizer_dir: Path, data_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama(vocabulary=300).save_pretrained(model)
    with pytest.raises(ModelError, match=r"gives token id 3\d\d, the model knows 300"):
        run(tmp_path / "cache", model, data_file, tokenizer=str(tokenizer_dir))
    assert not (tmp_path / "cache").exists()


def test_a_directory_of_something_else_is_left_alone(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OutputError, match="no reference cache"):
        run(tmp_path, model_dir, data_file)
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_the_order_of_files_is_the_order_of_pairs(model_dir: Path, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", make_rows(5, seed=seed)) for seed in (1, 2)]
    run(tmp_path / "cache", model_dir, *files)
    table, _ = ReferenceCache(tmp_path / "cache").load()
    assert table.source.tolist() == [[file, line] for file in (0, 1) for line in range(1, 6)]
