"""Rows that another program has scored become a cache: encoded as stage one does it, their logprobs taken over, never guessed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.data.formats import to_pair
from minicache.errors import CacheMismatch, ConfigError, DataError, HandshakeError, ModelError
from minicache.options.base import BaseOptions
from minicache.options.exchange import ExportCacheConfig, ImportConfig
from minicache.options.others import InspectConfig
from minicache.pairs import CHOSEN, REJECTED
from minicache.stages.export_cache import export_cache
from minicache.stages.import_cache import ImportReport, import_cache
from minicache.stages.inspect import verify_model as verify
from minicache.trackers import Silent
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl

Rows = list[dict[str, Any]]
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Rows]:
    """A cache that stage one made, and the same pairs as TRL holds them: conversations with a prompt, and sums."""
    home = tmp_path_factory.mktemp("foreign")
    rows = make_rows(20, seed=4)
    cache = precompute_into(home / "cache", model_dir, write_jsonl(home / "rows.jsonl", rows), max_length=64)
    _, reference = ReferenceCache(cache).load()
    sums = reference.logp_mean.astype(np.float64) * reference.token_count
    foreign = []
    for row, total in zip(rows, sums.tolist(), strict=True):
        pair = to_pair(row, "", 0)
        texts = {name: [vars(turn) for turn in getattr(pair, name)] for name in ("prompt", *SIDES)}
        foreign.append({**texts, "ref_chosen_logps": total[CHOSEN], "ref_rejected_logps": total[REJECTED]})
    return cache, foreign


def bring_in(rows: Rows, home: Path, model: Path, **options: Any) -> ImportReport:
    given = {"logps": "sum", "dtype": "float32", "max_length": 64, **options}
    file = write_jsonl(home / "foreign.jsonl", rows)
    return import_cache(ImportConfig(str(file), home / "cache", str(model), **given), Silent())


def assert_same_values(made: Path, wanted: Path) -> None:
    (table, reference), (wanted_table, wanted_reference) = (ReferenceCache(path).load() for path in (made, wanted))
    for name in ("tokens", "loss_mask", "lengths", "digest"):
        assert np.array_equal(getattr(table, name), getattr(wanted_table, name)), name
    assert np.array_equal(reference.logp_mean, wanted_reference.logp_mean)
    assert np.array_equal(reference.token_count, wanted_reference.token_count)


def test_sums_become_what_stage_one_would_have_stored(
    scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path
) -> None:
    cache, rows = scored
    report = bring_in(rows, tmp_path, model_dir, block_pairs=8)
    assert_same_values(tmp_path / "cache", cache)
    assert report.sources[0]["unused"] == {}
    opened = ReferenceCache(tmp_path / "cache")
    assert opened.identity == ReferenceCache(cache).identity and report.identity == opened.identity.digest
    assert (report.pairs, report.blocks, report.sources[0]["kept"]) == (20, 3, 20)
    assert not list(opened.verify())
    config = InspectConfig(tmp_path / "cache", verify=True, model=str(model_dir))
    assert verify(config, one_process(), Silent()) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "foreign.jsonl"]


def test_values_of_a_quantized_base(tmp_path: Path, model_dir: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    rows, base = make_rows(6, seed=4), BaseOptions(base_8bit=True)
    cache = precompute_into(tmp_path / "made", model_dir, write_jsonl(tmp_path / "rows.jsonl", rows), base=base)
    _, reference = ReferenceCache(cache).load()
    columns = {"ref_chosen_logps": CHOSEN, "ref_rejected_logps": REJECTED}
    means = reference.logp_mean.tolist()
    foreign = [
        row | {name: mean[side] for name, side in columns.items()} for row, mean in zip(rows, means, strict=True)
    ]
    bring_in(foreign, tmp_path, model_dir, logps="mean", base=base, max_length=None, block_pairs=8)
    assert ReferenceCache(tmp_path / "cache").identity == ReferenceCache(cache).identity
    config = InspectConfig(tmp_path / "cache", verify=True, model=str(model_dir))
    assert verify(config, one_process(), Silent()) < 1e-5
    export_cache(ExportCacheConfig(cache, tmp_path / "table.jsonl"), Silent())
    again = ImportConfig(str(tmp_path / "table.jsonl"), tmp_path / "again", str(model_dir), base=base)
    with pytest.raises(ConfigError, match=r"--base-8bit: .* was exported from a cache and holds this itself"):
        import_cache(again, Silent())


def test_sums_taken_for_means_are_found_out(scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(DataError, match=r"nats per token; a uniform guess over 400 .*--logps sum"):
        bring_in(scored[1], tmp_path, model_dir, logps="mean")
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.jsonl"]


def test_means_and_other_names(scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path) -> None:
    """As open-instruct keeps them for its length-normalised loss, and older TRL."""
    cache, rows = scored
    _, reference = ReferenceCache(cache).load()
    for number, names in enumerate(
        (("chosen_logps", "rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps"))
    ):
        renamed = [
            {**{name: row[name] for name in ("prompt", *SIDES)}, **dict(zip(names, means, strict=True))}
            for row, means in zip(rows, reference.logp_mean.tolist(), strict=True)
        ]
        (tmp_path / str(number)).mkdir()
        bring_in(renamed, tmp_path / str(number), model_dir, logps="mean")
        assert_same_values(tmp_path / str(number) / "cache", cache)


def test_rows_that_are_no_pairs_take_their_logprobs_with_them(
    scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path
) -> None:
    cache, rows = scored
    twice = {**rows[0], "ref_chosen_logps": -1.0}
    bad = {**rows[1], "chosen": rows[1]["rejected"], "ref_chosen_logps": float("nan")}
    report = bring_in([rows[0], bad, twice, *rows[1:]], tmp_path, model_dir)
    assert_same_values(tmp_path / "cache", cache)
    (source,) = report.sources
    assert (source["rows"], source["kept"], source["duplicates"], source["refused"]) == (22, 20, 1, {"identical": 1})
    assert (tmp_path / "cache" / "refused.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (float("nan"), "ref_rejected_logps: expected a logprob, a finite number of at most 0, got nan"),
        (None, "ref_rejected_logps: expected a logprob, a finite number of at most 0, got None"),
        (float("-inf"), "got -inf"),
        (0.5, "got 0.5"),
        (True, "got True"),
        ("-3", "got '-3'"),
    ],
)
def test_a_logprob_that_cannot_be(
    scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path, value: object, what: str
) -> None:
    rows = list(scored[1])
    rows[6] = {**rows[6], "ref_rejected_logps": value}
    with pytest.raises(DataError, match=r"foreign\.jsonl:7: ") as error:
        bring_in(rows, tmp_path, model_dir)
    assert what in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.jsonl"]


def test_other_tokens_than_were_scored(scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path) -> None:
    cache, rows = scored
    table = ReferenceCache(cache).load().table
    counts = table.token_counts.tolist()
    counted = [
        {**row, "chosen_token_count": a, "rejected_token_count": b} for row, (a, b) in zip(rows, counts, strict=True)
    ]
    (tmp_path / "same").mkdir()
    bring_in(counted, tmp_path / "same", model_dir)
    with pytest.raises(DataError, match=r"foreign.jsonl:\d+: chosen_token_count, .* tokens count"):
        bring_in(counted, tmp_path, model_dir, max_length=30)
    for names in ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"):
        tokens = [
            {**row, "prompt_ids": [], **{name: table[n].side(side)[0].tolist() for side, name in enumerate(names)}}
            for n, row in enumerate(rows)
        ]
        (tmp_path / names[0]).mkdir()
        bring_in(tokens, tmp_path / names[0], model_dir)
        tokens[2][names[1]][-1] += 1
        with pytest.raises(DataError, match=rf"foreign.jsonl:3: .*{names[1]} hold .* they differ from token \d+ on"):
            bring_in(tokens, tmp_path, model_dir)
    with pytest.raises(DataError, match=r"one pair of columns .* got several"):
        bring_in([{**rows[0], "chosen_logps": -1.0}], tmp_path, model_dir)
    with pytest.raises(DataError, match="got none of them"):
        bring_in(make_rows(2), tmp_path, model_dir)


def test_another_model_s_logprobs_are_found_out(
    scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path, tokenizer_dir: Path
) -> None:
    """Nothing in the file says whose they are: the handshake and --verify do."""
    from tests.conftest import tiny_llama

    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    bring_in(scored[1], tmp_path, tmp_path / "other", tokenizer=str(tokenizer_dir))
    config = InspectConfig(tmp_path / "cache", verify=True, model=str(tmp_path / "other"))
    with pytest.raises(HandshakeError):
        verify(config, one_process(), Silent())
    with pytest.raises(CacheMismatch):
        verify(InspectConfig(tmp_path / "cache", verify=True, model=str(model_dir)), one_process(), Silent())
    tiny_llama(vocabulary=50).save_pretrained(tmp_path / "small")
    (tmp_path / "again").mkdir()
    with pytest.raises(ModelError, match="the model knows 0 to 49"):
        bring_in(scored[1], tmp_path / "again", tmp_path / "small", tokenizer=str(tokenizer_dir))


def test_the_command(scored: tuple[Path, Rows], tmp_path: Path, model_dir: Path, cli: Cli) -> None:
    file = write_jsonl(tmp_path / "trl.jsonl", scored[1])
    options = ["--model", model_dir, "--logps", "sum", "--dtype", "float32", "--max-length", 64]
    code, stdout, stderr = cli("import-cache", file, "--ref-cache", tmp_path / "cache", *options)
    assert code == 0, stderr
    assert "20 pairs, 1 blocks" in stdout and f"--verify --model {model_dir}" in stdout
    code, _, stderr = cli("import-cache", file, "--ref-cache", tmp_path / "b", "--model", model_dir)
    assert code == 1 and "expected --logps, --dtype too" in stderr
    code, _, stderr = cli("import-cache", file, "--ref-cache", tmp_path / "b", "--identity", "x")
    assert code == 1 and "--identity: " in stderr and "add --model" in stderr
