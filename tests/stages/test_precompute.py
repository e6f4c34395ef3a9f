"""Stage one: values, resuming, appending, repairing, refusing."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache.cache.places.opening import claimed
from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheDamaged, CacheMismatch, DataError, HandshakeError, ModelError, OutputError
from minicache.models import fingerprint
from minicache.options.stage_one import PrecomputeConfig
from minicache.scoring.batch import Batch
from minicache.scoring.scorer import PairScores, Scorer
from minicache.stages.precompute import PrecomputeReport, precompute
from minicache.trackers import Silent
from tests.cache.test_cache import DAMAGE, Killed, fail_at_step, undone
from tests.conftest import Cli, make_rows, one_process, precompute_into, tiny_llama, write_jsonl
from tests.helpers.stores import assert_same_store, chunk_files, contents
from tests.scoring.test_scoring import plain_logps


def run(path: Path, model: Path, *data: Path, **options: Any) -> PrecomputeReport:
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


@pytest.mark.parametrize(
    "options", [{"tokens_per_batch": 1}, {"tokens_per_batch": 10**6}, {"block_pairs": 40}, {"block_pairs": 1}]
)
def test_how_pairs_are_batched_changes_no_value(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    other = means(precompute_into(tmp_path / "cache", model_dir, data_file, **options))
    for digest, mean in means(ref_cache).items():
        assert np.abs(other[digest] - mean).max() < 1e-5


def test_per_token_values_have_the_stored_means(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    table, scores = ReferenceCache(precompute_into(tmp_path / "cache", model_dir, data_file, per_token=True)).load()
    assert scores.token_logps is not None
    assert np.array_equal(~np.isnan(scores.token_logps), table.loss_mask == 1)
    for index in range(len(table)):
        part = scores.token_logps[table.offsets[index] : table.offsets[index + 1]]
        prefix, chosen, _ = table.lengths[index]
        sides = part[: prefix + chosen], np.concatenate([part[:prefix], part[prefix + chosen :]])
        assert np.allclose([np.nanmean(side) for side in sides], scores.logp_mean[index], atol=1e-5)


def test_what_is_done_is_not_done_again(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    renamed = shutil.copy(data_file, tmp_path / "renamed.jsonl")
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in cache.rglob("*")}
    for files in ((data_file,), (renamed,), (data_file, renamed)):
        report = run(cache, model_dir, *files)
        assert report.scored == 0 and report.pairs == 40 and len(report.sources) == 1
    code, stdout, _ = cli("precompute-ref", "--model", model_dir, "--data", renamed, "--ref-cache", cache)
    assert code == 0 and "nothing left to score" in " ".join(stdout.split())
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in cache.rglob("*")} == before


def test_more_data_is_appended_and_only_that_is_scored(
    ref_cache: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    rows = make_rows(40)[5:25] + make_rows(12, seed=5)
    more = write_jsonl(tmp_path / "more.jsonl", [*rows, rows[-1]])
    scored = []
    forward = Scorer.forward

    def counting(self: Scorer, batch: Batch, *rest: object, **options: object) -> PairScores:
        scored.append(batch.pairs)
        return forward(self, batch)

    monkeypatch.setattr(Scorer, "forward", counting)
    report = run(cache, model_dir, more, layout="padded", tokens_per_batch=4096)
    assert report.scored == 12 and report.pairs == 52
    # after three pairs that show whether padding moves logprobs; and the handshake with what was there
    assert scored[:2] == [1, 2] and sum(scored[2:]) == 12 + 8
    assert (report.sources[1].rows, report.sources[1].kept, report.sources[1].duplicates) == (33, 12, 21)
    old, new = means(ref_cache), means(cache)
    assert len(new) == 52 and all(np.array_equal(new[digest], old[digest]) for digest in old)
    alone = means(
        precompute_into(
            tmp_path / "alone",
            model_dir,
            write_jsonl(tmp_path / "a.jsonl", make_rows(12, seed=5)),
            tokens_per_batch=4096,
        )
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
    listed = [json.loads(line) for line in Path(report.refused_file).read_text().splitlines()]
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
    with pytest.raises(DataError, match=r"mixed\.jsonl:12: broken-json"):
        text = "\n".join([*(json.dumps(row) for row in make_rows(11, seed=9)), "{broken"])
        file.write_text(text)
        run(old, model_dir, file, on_bad_row="fail")  # a whole block of it was written already
    assert contents(old) == before


def test_refused_rows_of_all_files_stay_listed(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of one name, in two directories; a file known already is not listed twice."""
    for number, bad in enumerate(("{broken", '{"chosen": []}')):
        (tmp_path / str(number)).mkdir()
        rows = [*(json.dumps(row) for row in make_rows(3, seed=number)), bad]
        (tmp_path / str(number) / "data.jsonl").write_text("\n".join(rows))
    for number in (0, 1, 0):
        monkeypatch.chdir(tmp_path / str(number))
        report = run(tmp_path / "cache", model_dir, Path("data.jsonl"))
    (tmp_path / "cache/pairs/tokens/c/0/0").unlink()  # the files are read again
    run(tmp_path / "cache", model_dir, Path("data.jsonl"), tmp_path / "1" / "data.jsonl")
    listed = [json.loads(line) for line in Path(report.refused_file).read_text().splitlines()]
    assert sorted((row["source"], row["line"], row["reason"]) for row in listed) == [
        (0, 4, "broken-json"),
        (1, 4, "missing-field"),
    ]


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
    ref_cache: Path, model_dir: Path, data_file: Path, field: str, options: dict[str, Any]
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
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its digest, and where no digest covers what differs by what it says."""
    model, cache = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "cache"
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 17.0
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "SETTINGS", ())
        run(cache, model_dir, data_file)
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(HandshakeError):
            run(cache, model, data_file)
    run(tmp_path / "other", model_dir, data_file)
    with pytest.raises(CacheMismatch, match="weights is"):
        run(tmp_path / "other", model, data_file)


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path]:
    """A cache of two blocks of two pairs, with every array there is; and its data."""
    place = tmp_path_factory.mktemp("two")
    data = write_jsonl(place / "data.jsonl", make_rows(4))
    return precompute_into(place / "cache", model_dir, data, block_pairs=2, per_token=True), data


@pytest.mark.parametrize("damage", [pytest.param(each, marks=[pytest.mark.slow] * (each != "flip")) for each in DAMAGE])
def test_the_same_command_repairs_any_damaged_chunk(
    two_blocks: tuple[Path, Path], model_dir: Path, tmp_path: Path, damage: str
) -> None:
    sound, data = two_blocks
    for number, chunk in enumerate(chunk_files(sound)):
        cache = shutil.copytree(sound, tmp_path / str(number))
        DAMAGE[damage](cache / chunk.relative_to(sound))
        run(cache, model_dir, data, block_pairs=2, per_token=True)
        assert_same_store(cache, sound)


def test_scores_of_sound_pairs_survive_the_repair_of_others(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """Pairs made anew are the same pairs, so even their own scores still fit; of scores only what is damaged is done again."""
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    for file in ("pairs/tokens/c/1/0", "ledger/pairs/c/3/0", "ref/token_count/c/4/0/0"):
        (cache / file).write_bytes(b"")
    assert run(cache, model_dir, data_file).scored == 8
    assert_same_store(cache, ref_cache)


def three_files(place: Path) -> list[Path]:
    """19 pairs, 3 of them twice, and a bad row; in blocks of 4 of their own: 0-1, 2-3, 4-5."""
    place.mkdir(exist_ok=True)
    rows = [make_rows(count, seed=seed) for seed, count in enumerate((7, 5, 7), start=20)]
    rows[2][2:2] = [rows[0][6], rows[1][1], rows[0][0], {"chosen": []}]
    return [write_jsonl(place / f"{number}.jsonl", part) for number, part in enumerate(rows)]


@pytest.fixture(scope="module")
def from_three_files(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, list[Path]]:
    place = tmp_path_factory.mktemp("three")
    files = three_files(place / "data")
    return precompute_into(place / "cache", model_dir, *files, block_pairs=4), files


def test_one_file_after_the_other_gives_the_store_of_all_at_once(
    from_three_files: tuple[Path, list[Path]], model_dir: Path, tmp_path: Path
) -> None:
    whole, files = from_three_files
    for file in files:
        run(tmp_path / "cache", model_dir, file, block_pairs=4)
    assert_same_store(tmp_path / "cache", whole)
    table, _ = ReferenceCache(whole).load()
    assert len(table) == 19 and [source.duplicates for source in ReferenceCache(whole).log.sources] == [0, 0, 3]


@pytest.mark.parametrize("lost", [{1}, {1, 3}, {1, 3, 5}, {0, 2, 4}, {2, 3}, {0, 1, 2, 3, 4, 5}])
def test_lost_blocks_get_their_own_pairs_back(
    from_three_files: tuple[Path, list[Path]], model_dir: Path, tmp_path: Path, lost: set[int]
) -> None:
    """Blocks that are not full too, and whatever the order in which the files are named."""
    whole, files = from_three_files
    cache = shutil.copytree(whole, tmp_path / "cache")
    for block in lost:
        (cache / "ledger" / "pairs" / "c" / str(block) / "0").unlink()
    assert run(cache, model_dir, *reversed(files), block_pairs=4).scored == 0
    assert_same_store(cache, whole)


@pytest.mark.parametrize("lost", range(6))
def test_only_files_that_may_hold_a_lost_block_are_asked_for(
    from_three_files: tuple[Path, list[Path]], model_dir: Path, tmp_path: Path, lost: int
) -> None:
    whole, files = from_three_files
    cache = shutil.copytree(whole, tmp_path / "cache")
    (cache / "pairs" / "tokens" / "c" / str(lost) / "0").unlink()
    before = contents(cache)
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(3, seed=8))
    with pytest.raises(CacheDamaged, match=rf"block {lost} .*add to --data: .*{files[lost // 2].name}") as refusal:
        run(cache, model_dir, other, block_pairs=4)
    assert contents(cache) == before
    asked_for = [file for file in files if str(file) in str(refusal.value)]
    assert len(asked_for) <= 2
    run(cache, model_dir, *asked_for, block_pairs=4)
    assert_same_store(cache, whole)


def test_pairs_that_the_files_no_longer_give_are_not_kept(
    from_three_files: tuple[Path, list[Path]], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of the tokenizer's library in the middle of a run: never a cache of both."""
    whole, files = from_three_files
    cache = shutil.copytree(whole, tmp_path / "cache")
    (cache / "ledger" / "pairs" / "c" / "1" / "0").unlink()
    before = contents(cache)
    render = ChatTokenizer.render
    monkeypatch.setattr(ChatTokenizer, "render", lambda *args, **options: render(*args, **options) + "!")
    with pytest.raises(CacheDamaged, match="other pairs than when they were first read"):
        run(cache, model_dir, *files, block_pairs=4)
    after = contents(cache)
    changed = {name for name in after if after[name] != before.get(name)}
    assert before.keys() <= after.keys() and all("/c/1/" in name for name in changed), changed


def test_the_tokenizer_in_a_cache_is_repaired_too(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    for number, (file, damage) in enumerate(
        (("tokenizer.json", "truncate"), ("tokenizer.json", "delete"), ("chat_template.jinja", "truncate"))
    ):
        cache = shutil.copytree(ref_cache, tmp_path / str(number))
        DAMAGE[damage](cache / "tokenizer" / file)
        run(cache, model_dir, data_file)
        assert_same_store(cache, ref_cache)


@pytest.mark.parametrize("first", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_killed_at_any_step_and_called_again_the_store_is_the_same(
    from_three_files: tuple[Path, list[Path]], model_dir: Path, tmp_path: Path, first: int
) -> None:
    """Stage one over all files, or over the last alone, appended to the others: whoever resumes names the same files."""
    whole, files = from_three_files
    start = tmp_path / "start"
    if first == 5:
        run(start, model_dir, *files[:2], block_pairs=4)
        files = files[2:]
    for step in range(first, 400, 9):
        cache = shutil.copytree(start, tmp_path / str(step)) if start.exists() else tmp_path / str(step)
        sound = undone(cache) if start.exists() else set()
        with pytest.MonkeyPatch.context() as patch:
            done = fail_at_step(patch, step, Killed())
            try:
                run(cache, model_dir, *files, block_pairs=4)
            except Killed:
                assert len(done) == step
        if cache.exists():
            assert not any(block < 4 for _, block in undone(cache) - sound) or first != 5
        run(cache, model_dir, *files, block_pairs=4)
        assert_same_store(cache, whole)
        if len(done) < step:
            break
    assert len(done) < step and step > 40


def test_an_interrupted_append_that_is_given_up_is_dropped(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong file was named and the call stopped; it may not stand in the way, nor in the cache."""
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    wrong = write_jsonl(tmp_path / "wrong.jsonl", make_rows(30, seed=6))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at_step(patch, 45, Killed())
        run(cache, model_dir, wrong)
    assert len(ReferenceCache(cache).blocks) > 5
    wrong.unlink()
    assert run(cache, model_dir, data_file).scored == 0
    assert_same_store(cache, ref_cache)


def test_a_file_once_read_in_one_format_is_not_taken_for_another(
    ref_cache: Path, model_dir: Path, data_file: Path
) -> None:
    with pytest.raises(CacheMismatch, match=r"pairs\.jsonl was read with --format auto, asked for --format messages"):
        run(ref_cache, model_dir, data_file, format="messages")


def test_two_runs_on_one_cache_do_not_mix(ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    (cache / "0.partial").touch()  # of a chunk that the other is writing
    with claimed(cache), pytest.raises(OutputError, match="another precompute-ref"):
        run(cache, model_dir, data_file)
    assert (cache / "0.partial").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs leave to mount a file system: {error}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_when_a_disk_runs_full_finished_blocks_stay_and_the_same_call_goes_on(
    small_disk: Path, ref_cache: Path, model_dir: Path, data_file: Path
) -> None:
    """Once while encoding, once while scoring; more space comes a little at a time."""
    cache, ballast = small_disk / "cache", small_disk / "ballast"
    finished: set[tuple[str, int]] = set()
    failures = 0
    everything = {(what, block) for what in ("pairs", "ref") for block in range(5)}
    ballast.write_bytes(b"x" * 4096 * 60)
    while True:
        try:
            run(cache, model_dir, data_file)
            break
        except OutputError as error:
            assert "the disk is full" in str(error)
            failures += 1
        if cache.exists():
            blocks = {(what, block) for what, block in everything if block < len(ReferenceCache(cache).blocks)}
            now = blocks - undone(cache)
            assert finished <= now
            finished = now
        ballast.write_bytes(b"x" * (ballast.stat().st_size - 4 * 4096))
    assert failures > 2 and finished and finished != everything
    assert_same_store(cache, ref_cache)


def test_no_finite_logprob_no_entry(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """One token's embedding is broken: the first pair with that token is named, and its block has no scores."""
    table, _ = ReferenceCache(precompute_into(tmp_path / "sound", model_dir, data_file)).load()
    bad = [index for index in range(40) if 300 in table[index].tokens]
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = float("nan")
    broken = shutil.copytree(model_dir, tmp_path / "model")
    model.save_pretrained(broken)
    with pytest.raises(ModelError, match=rf"no finite logprob for \d+ pairs, the first from {data_file}:{bad[0] + 1};"):
        run(tmp_path / "cache", broken, data_file)
    assert undone(tmp_path / "cache") == {("ref", block) for block in range(bad[0] // 8, 5)}


def test_a_tokenizer_of_another_model_is_refused(tokenizer_dir: Path, data_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_llama(vocabulary=300).save_pretrained(model)
    with pytest.raises(ModelError, match=r"gives token id 3\d\d, the model knows 0 to 299"):
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
