"""A cache as a table and back: the columns are what was scored, the way back gives the same store, and changes are refused."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheMismatch, ConfigError, DataError, MinicacheError, OutputError
from minicache.exchange.rows import prompt_length
from minicache.exchange.tables import document_beside, read_document, read_table
from minicache.options.exchange import ExportCacheConfig, ImportConfig
from minicache.pages.card import is_unchanged
from minicache.pairs import CHOSEN, REJECTED, EncodedPair
from minicache.stages.export_cache import export_cache
from minicache.stages.import_cache import import_cache
from minicache.trackers import Silent
from tests.conftest import Cli, make_rows, precompute_into, write_jsonl
from tests.helpers.stores import contents

KINDS = ("pairs.parquet", "pairs.jsonl", "pairs.jsonl.gz", "pairs.jsonl.zst", "pairs")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Two files, blocks that are not full, --per-token, and pairs whose answers begin alike."""
    home = tmp_path_factory.mktemp("exchange")
    rows = make_rows(13, seed=1)
    for row in rows[:5]:
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] = f"the cat sat {row[side][-1]['content']}"
    files = [write_jsonl(home / "a.jsonl", rows), write_jsonl(home / "b.jsonl", make_rows(6, seed=2))]
    return precompute_into(home / "cache", model_dir, *files, per_token=True)


def exported(cache: Path, out: Path) -> Path:
    export_cache(ExportCacheConfig(cache, out), Silent())
    return out


def imported(file: Path, to: Path, **options: Any) -> Path:
    import_cache(ImportConfig(str(file), to, **options), Silent())
    return to


def identity_of(cache: Path) -> str:
    return ReferenceCache(cache).identity.digest


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back_gives_the_same_store(cache: Path, tmp_path: Path, name: str) -> None:
    file = exported(cache, tmp_path / "out" / name)
    back = imported(file, tmp_path / "back", identity=identity_of(cache))
    before, after = contents(cache), contents(back)
    before.pop("refused.jsonl")  # counted in the log, listed only where the rows were read
    assert before == after
    assert not list(ReferenceCache(back).verify())
    assert not list(tmp_path.rglob(".*")), "no draft remains"


def test_into_an_object_store_and_out_of_it(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="needs obstore: pip install '.[s3]'")
    first = exported(cache, tmp_path / "first.jsonl")
    place = "memory://exchange/cache"
    import_cache(ImportConfig(str(first), place, identity=identity_of(cache)), Silent())
    export_cache(ExportCacheConfig(place, tmp_path / "second.jsonl"), Silent())
    assert first.read_bytes() == (tmp_path / "second.jsonl").read_bytes()
    assert document_beside(first).read_bytes() == document_beside(tmp_path / "second.jsonl").read_bytes()


def test_every_kind_holds_the_same_rows(cache: Path, tmp_path: Path) -> None:
    rows = [[row for _, row in read_table(str(exported(cache, tmp_path / name)))] for name in KINDS]
    assert all(each == rows[0] for each in rows[1:]) and len(rows[0]) == 19


def test_the_columns_are_what_was_scored(cache: Path, tmp_path: Path) -> None:
    opened = ReferenceCache(cache)
    tokenizer = ChatTokenizer.load(opened.tokenizer_dir)
    cached = opened.load()
    rows = [row for _, row in read_table(str(exported(cache, tmp_path / "pairs.parquet")))]
    for index, row in enumerate(rows):
        pair = cached.table[index]
        shared = row["prompt"]
        assert shared.endswith("<|im_start|>assistant\n") and row["file"].endswith(".jsonl")
        for side, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            ids, mask = pair.side(side)
            assert row["prompt_ids"] + row[f"{name}_ids"] == ids.tolist()
            assert row[f"{name}_loss_mask"] == mask.tolist()
            assert shared + row[name] == tokenizer.decode(ids)
            assert mask.tolist() == [0] * len(row["prompt_ids"]) + [1] * len(row[f"{name}_ids"])
            assert row[f"{name}_token_count"] == len(row[f"{name}_ids"])
            total = row[f"ref_{name}_logps"]
            assert np.float32(total / row[f"{name}_token_count"]) == cached.reference.logp_mean[index, side]
        begin = "the cat sat" if index < 5 else ""
        assert row["chosen"].startswith(begin) and row["rejected"].startswith(begin)
        assert bytes.fromhex(row["digest"]) == pair.digest
        assert (row["source"], row["line"]) == pair.source


def test_where_the_answers_begin() -> None:
    def begin(chosen: str, rejected: str) -> int:
        """Tokens as letters, those that count as capitals."""
        sides = [
            (np.array([ord(c.lower()) for c in s]), np.array([c.isupper() for c in s])) for s in (chosen, rejected)
        ]
        return prompt_length(EncodedPair.join(*sides[0], *sides[1]))

    assert begin("abCD", "abEF") == 2
    assert begin("abCDE", "abCDF") == 2, "the answers begin alike"
    assert begin("abCD", "abCDE") == 2, "one goes on where the other ends"
    assert begin("aBCdeFG", "aBCdeFH") == 5, "an earlier answer that counts is prompt"
    assert begin("abXC", "abyZ") == 2, "a token across the border counts on one side only"
    assert begin("abc", "abdE") == 2, "what parts before the answers"


def test_a_file_says_that_it_was_changed(cache: Path, tmp_path: Path) -> None:
    file = exported(cache, tmp_path / "pairs.jsonl")
    lines = file.read_text().splitlines()

    def refused(number: int, **changes: Any) -> str:
        row = json.loads(lines[number - 1])
        for name, change in changes.items():
            row[name] = change(row[name])
        changed = [*lines[: number - 1], json.dumps(row), *lines[number:]]
        file.write_text("".join(f"{each}\n" for each in changed))
        with pytest.raises(DataError) as error:
            imported(file, tmp_path / "back", identity=identity_of(cache))
        assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))
        return str(error.value)

    assert "pairs.jsonl:3: its tokens or masks have the digest" in refused(3, chosen_ids=lambda ids: [5, *ids[1:]])
    assert "pairs.jsonl:4: its tokens or masks have the digest" in refused(4, digest=lambda digest: "0" * 32)
    assert "pairs.jsonl:1: expected counts" in refused(1, chosen_token_count=lambda count: count + 1)
    assert "pairs.jsonl:1: expected counts" in refused(1, ref_chosen_logps=lambda total: float("nan"))
    assert "rows 9 to 13 (block 1 of the cache)" in refused(9, ref_rejected_logps=lambda total: total - 1e-3)
    assert "rows 14 to 19 (block 2 of the cache)" in refused(14, line=lambda line: line + 1)
    assert "pairs.jsonl:2: has the file number 7" in refused(2, source=lambda source: 7)
    assert "pairs.jsonl:2: is not as it was exported" in refused(2, prompt_ids=lambda ids: None)
    assert "pairs.jsonl:2: is not as it was exported" in refused(2, chosen_loss_mask=lambda mask: [*mask[1:], 2])
    assert "pairs.jsonl:2: expected" in refused(2, ref_token_logps=lambda logps: logps[1:])
    for changed, what in ((lines[:-1], "fewer"), ([*lines, lines[0]], "more"), (lines[::-1], "rows 1 to 8")):
        file.write_text("".join(f"{each}\n" for each in changed))
        with pytest.raises(DataError, match=what):
            imported(file, tmp_path / "back", identity=identity_of(cache))


def test_a_changed_document_is_refused(cache: Path, tmp_path: Path) -> None:
    file = exported(cache, tmp_path / "pairs.jsonl")
    beside = document_beside(file)
    sound = json.loads(beside.read_text())

    def refused(change: Callable[[dict[str, Any]], object]) -> str:
        document = json.loads(json.dumps(sound))
        change(document)
        beside.write_text(json.dumps(document))
        with pytest.raises(MinicacheError) as error:
            imported(file, tmp_path / "back", identity=identity_of(cache))
        assert not (tmp_path / "back").exists()
        return str(error.value)

    assert "does not fit its digest" in refused(lambda d: d["minicache"]["identity"].update(dtype="float16"))
    assert "has export format 2" in refused(lambda d: d.update(export=2))
    assert "without a minicache manifest" in refused(lambda d: d.pop("minicache"))
    assert "its ledger does not fit" in refused(lambda d: d["ledger"].pop())
    assert "its document was changed" in refused(lambda d: d.pop("ledger"))
    assert "the tokenizer's files" in refused(lambda d: d.pop("tokenizer"))
    assert "expected one below its directory" in refused(lambda d: d["tokenizer"].update({"../evil": "eJwDAAAAAAE="}))
    assert "cannot be unpacked" in refused(lambda d: d["tokenizer"].update({"tokenizer.json": "eJw"}))
    template = "eJwDAAAAAAE="  # nothing, compressed
    assert "not the one its identity names" in refused(
        lambda d: d["tokenizer"].update({"chat_template.jinja": template})
    )
    beside.write_text("[]")
    with pytest.raises(DataError, match="no JSON object"):
        imported(file, tmp_path / "back", identity=identity_of(cache))
    beside.unlink()
    with pytest.raises(DataError, match=r"FILE\.minicache\.json is not beside it"):
        imported(file, tmp_path / "back", identity=identity_of(cache))


def test_the_user_says_what_it_is(cache: Path, tmp_path: Path, cli: Cli, model_dir: Path, tokenizer_dir: Path) -> None:
    from tests.conftest import tiny_llama

    code, stdout, _ = cli("export", "--ref-cache", cache, "--out", tmp_path / "pairs.parquet")
    digest = identity_of(cache)
    assert code == 0 and f"19 pairs in {tmp_path}/pairs.parquet, identity {digest}" in stdout

    def refused(*options: object) -> str:
        code, _, stderr = cli("import-cache", tmp_path / "pairs.parquet", "--ref-cache", tmp_path / "back", *options)
        assert code == 1 and not (tmp_path / "back").exists()
        (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
        return line

    assert f"Expected you to confirm it: --identity {digest}, or --model MODEL" in refused()
    assert f"its identity is {digest}, expected 123" in refused("--identity", "123")
    assert "--max-length: " in refused("--identity", digest, "--max-length", 9)
    assert "was exported from a cache and holds this itself" in refused("--identity", digest, "--loss-on", "response")
    tiny_llama(seed=3).save_pretrained(tmp_path / "other")
    assert "expected the model that it was exported for" in refused("--model", tmp_path / "other")
    code, stdout, stderr = cli(
        "import-cache", tmp_path / "pairs.parquet", "--ref-cache", tmp_path / "back", "--model", model_dir
    )
    assert code == 0 and "19 pairs, 3 blocks" in stdout, stderr
    assert "exists" in cli("import-cache", tmp_path / "pairs.parquet", "--ref-cache", tmp_path / "back")[2]


def test_mistakes_at_export_are_one_line(cache: Path, tmp_path: Path, cli: Cli) -> None:
    def refused(*options: object) -> str:
        code, _, stderr = cli("export", *options)
        assert code == 1
        (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
        return line

    out = tmp_path / "pairs.parquet"
    assert "expected --policy POLICY or --ref-cache CACHE, got neither" in refused("--out", out)
    assert "got both" in refused("--out", out, "--policy", "x", "--ref-cache", cache)
    assert "a cache has its own" in refused("--out", out, "--ref-cache", cache, "--dtype", "float32")
    assert "expected a name that ends in .parquet" in refused("--out", tmp_path / "pairs.csv", "--ref-cache", cache)
    out.write_text("mine")
    assert "exists already" in refused("--out", out, "--ref-cache", cache)
    assert out.read_text() == "mine"
    shutil.copytree(cache, tmp_path / "holed")
    shutil.rmtree(tmp_path / "holed" / "ref" / "logp_mean" / "c" / "1")
    assert "ref/logp_mean, block 1" in refused("--out", tmp_path / "new.parquet", "--ref-cache", tmp_path / "holed")
    assert [path.name for path in tmp_path.iterdir()] in (["pairs.parquet", "holed"], ["holed", "pairs.parquet"])


def test_the_same_cache_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    for name in ("pairs.jsonl.gz", "pairs.parquet"):
        first, second = (exported(cache, tmp_path / part / name).read_bytes() for part in ("a", "b"))
        assert first == second
    assert gzip.decompress((tmp_path / "a" / "pairs.jsonl.gz").read_bytes()).startswith(b'{"prompt":"<|im_start|>user')


def test_export_and_import_need_no_torch(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from minicache.cli import main; "
        "sys.argv[1:] = {}; main()"
    )
    file, back = tmp_path / "pairs.parquet", tmp_path / "back"
    for line in (
        f"export --ref-cache {cache} --out {file}",
        f"import-cache {file} --ref-cache {back} --identity {identity_of(cache)}",
    ):
        subprocess.run([sys.executable, "-c", code.format(line.split())], check=True, capture_output=True)
    assert len(ReferenceCache(back).load().table) == 19


def test_a_table_of_another_program_has_no_document(tmp_path: Path, data_file: Path) -> None:
    assert read_document(str(data_file)) is None
    with pytest.raises(ConfigError, match=r"expected --model, --logps, --dtype too"):
        imported(data_file, tmp_path / "back")
    with pytest.raises(DataError, match="no such file"):
        imported(tmp_path / "gone.jsonl", tmp_path / "back")
    with pytest.raises(DataError, match="it holds no file at all"):
        imported(tmp_path, tmp_path / "back")


def test_a_place_that_is_taken_is_told_first(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        imported(tmp_path / "gone.jsonl", cache)
    with pytest.raises(CacheMismatch, match="its identity is"):
        imported(exported(cache, tmp_path / "pairs.jsonl"), tmp_path / "back", identity="no")


def test_a_table_has_a_card_and_a_persons_own_stays(cache: Path, tmp_path: Path, cli: Cli) -> None:
    table, card = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.md"
    digest = ReferenceCache(cache).identity.digest
    assert cli("export", "--ref-cache", cache, "--out", table)[0] == 0
    text = card.read_text(encoding="utf-8")
    assert is_unchanged(text) and f"import-cache pairs.jsonl --ref-cache cache/ --identity {digest}" in text
    assert str(tmp_path.parent) not in text and "| `a.jsonl` | 13 |" in text
    table.unlink()
    card.write_text(text + "\nmine\n")
    code, stdout, _ = cli("export", "--ref-cache", cache, "--out", table)
    assert code == 0 and "stays" in stdout and card.read_text().endswith("mine\n")
    assert cli("export", "--ref-cache", cache, "--out", tmp_path / "pairs")[0] == 0
    assert digest in (tmp_path / "pairs/README.md").read_text(encoding="utf-8")
