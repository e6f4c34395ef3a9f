"""A payload for each way in which a stranger's bytes reach a loader: refused in one line or read as data, and never run.

SECURITY.md lists the ways. Those of checkpoints of runs are in training/test_hostile_checkpoint.py, of .pth files in
models/test_pth_file.py, of templates in data/test_hostile.py and data/test_bounded_jinja.py, of the working directory in
commands/test_working_directory.py.
"""

import bz2
import gzip
import json
import lzma
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from minicache.cache.identity import digest_of
from minicache.cache.manifest import MOST_BLOCKS
from minicache.cache.reader import ReferenceCache
from minicache.commands import running
from minicache.data.files import read_rows, zstd
from minicache.data.folders import Folder
from minicache.errors import CacheDamaged, ConfigError, MinicacheError, ModelError, OutputError
from minicache.exchange.tables import read_document
from minicache.judge.connection import Again, Connection
from minicache.judge.key import Key
from minicache.judge.verdicts import read_verdicts
from minicache.models import load_model, patterns
from minicache.models.adapter_places import own_template
from minicache.models.directories import require_plain_files
from minicache.models.tokenizers import save_tokenizer
from minicache.options.config_file import options_in
from minicache.options.train import TrainConfig
from minicache.pages.run_answers import read_answers
from minicache.reports.curves import read_curves
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.trackers.libraries import RunName, Wandb
from minicache.training.run_directory import read_record
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.adapters import sft_adapter

ROOT = Path(__file__).parents[1]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def model(tmp_path: Path, model_dir: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def code(marker: Path) -> str:
    return f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass A: pass\n"


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# --- models ---


def with_code(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(code(marker))
    mapped = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.A")
    change(model / "config.json", model_type="nobody-knows", auto_map=mapped)


def with_code_of_a_known_family(model: Path, marker: Path) -> None:
    (model / "evil.py").write_text(code(marker))
    change(model / "config.json", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.A"})


def with_a_generate_of_its_own(model: Path, marker: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(marker) + "def generate(*a, **k): pass\n")
    (model / "generation_config.json").write_text(json.dumps({"custom_generate": str(model)}))


def pickled(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(marker)}, model / "pytorch_model.bin")


def pickled_in_the_old_form(model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"a": Payload(marker)}, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def pickled_and_named_by_the_config(model: Path, marker: Path) -> None:
    torch.save({"a": Payload(marker)}, model / "other.bin")
    change(model / "config.json", transformers_weights="other.bin")


def a_kernel_of_a_hub(model: Path, marker: Path) -> None:
    change(model / "config.json", _attn_implementation="somebody/kernel")


def a_kernel_for_experts(model: Path, marker: Path) -> None:
    change(model / "config.json", _experts_implementation="somebody/kernel:f")


def quantized_by_code(model: Path, marker: Path) -> None:
    change(model / "config.json", quantization_config={"quant_method": "evil", "module": "evil.A"})


def a_pipe(model: Path, marker: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")


REFUSED = [with_code, pickled, pickled_in_the_old_form, pickled_and_named_by_the_config]
REFUSED += [a_kernel_of_a_hub, a_kernel_for_experts, quantized_by_code, a_pipe]
CLEAN = [with_code_of_a_known_family, with_a_generate_of_its_own]


@pytest.mark.parametrize("spoil", REFUSED)
def test_a_model_with_a_payload_is_refused(model: Path, marker: Path, spoil: Callable[[Path, Path], None]) -> None:
    spoil(model, marker)
    with pytest.raises(ModelError) as error:
        load_model(str(model))
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize("spoil", CLEAN)
def test_a_payload_that_nothing_needs_is_not_run(
    model: Path, marker: Path, spoil: Callable[[Path, Path], None]
) -> None:
    expected = load_model(str(model)).fingerprint
    spoil(model, marker)
    assert load_model(str(model)).fingerprint == expected
    assert not marker.exists()


def test_a_tokenizer_with_code_is_refused_or_read_without_it(model: Path, marker: Path, tmp_path: Path) -> None:
    (model / "evil.py").write_text(code(marker))
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}, tokenizer_class="A")
    try:
        save_tokenizer(str(model), tmp_path / "tokenizer", trust_remote_code=False)
    except ModelError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


# --- adapters ---


def weights_pickled(adapter: Path, marker: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Payload(marker)}, adapter / "adapter_model.bin")


def names_a_module(adapter: Path, marker: Path) -> None:
    (adapter / "evil_module.py").write_text(code(marker))
    change(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil_module")


def names_itself(adapter: Path, marker: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))


def names_a_number(adapter: Path, marker: Path) -> None:
    change(adapter / "adapter_config.json", base_model_name_or_path=7)


@pytest.mark.parametrize("spoil", [weights_pickled, names_a_module, names_itself, names_a_number])
def test_an_adapter_with_a_payload_is_refused(
    model: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path, Path], None]
) -> None:
    adapter = sft_adapter(model, tmp_path / "adapter")
    monkeypatch.syspath_prepend(adapter)
    spoil(adapter, marker)
    with pytest.raises(ModelError) as error:
        load_model(str(adapter))
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_adapters_pattern_that_would_take_years_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    adapter, endless = sft_adapter(model, tmp_path / "adapter"), r"([\w.]+)+!"
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    change(adapter / "adapter_config.json", **{name: {endless: 2} if name == "rank_pattern" else endless})
    with pytest.raises(ModelError, match="a pattern in its settings takes more than 1 s"):
        load_model(str(adapter))


def test_an_adapters_plain_pattern_is_used(model: Path, tmp_path: Path) -> None:
    adapter = sft_adapter(model, tmp_path / "adapter")
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    change(adapter / "adapter_config.json", target_modules=rf".*\.({'|'.join(names)})")
    load_model(str(adapter))


def test_a_class_that_an_adapter_names_is_not_imported(
    model: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = sft_adapter(model, tmp_path / "adapter")
    (adapter / "evil_module.py").write_text(code(marker))
    monkeypatch.syspath_prepend(adapter)
    mapped = {"base_model_class": "A", "parent_library": "evil_module"}
    change(adapter / "adapter_config.json", auto_mapping=mapped, task_type=None)
    load_model(str(adapter))
    assert not marker.exists() and "evil_module" not in sys.modules


def test_an_adapter_that_is_pickled_is_told_for_what_it_is(model: Path, marker: Path, tmp_path: Path) -> None:
    weights_pickled(adapter := sft_adapter(model, tmp_path / "adapter"), marker)
    with pytest.raises(ModelError, match=r"adapter_model\.bin holds more than tensors, which is never run"):
        load_model(str(adapter))


# --- trackers, compiler ---


@pytest.mark.parametrize("known", [7, [], "../../elsewhere", "a\\b", "", "a\nb", "x" * 257])
def test_what_is_no_id_of_a_run_reaches_no_tracker(tmp_path: Path, known: object) -> None:
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": known}))
    library = Wandb("wandb", RunName(tmp_path, "minicache", "run", 5))
    with pytest.raises(ConfigError, match="expected the id of a run"):
        library.known_id()
    (tmp_path / "trackers.json").write_text(json.dumps({"wandb": "ab-1_c.d 中"}))
    assert library.known_id() == "ab-1_c.d 中"


@pytest.mark.parametrize(
    ("mode", "owner", "left"), [(0o700, 0, False), (0o777, 0, True), (0o775, 0, True), (0o700, 1, True)]
)
def test_the_compiler_reads_no_programs_of_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, left: bool
) -> None:
    monkeypatch.setattr(running, "getuser", lambda: "me")
    place = tmp_path / "torchinductor_me"
    place.mkdir()
    place.chmod(mode)
    mine = os.getuid()
    monkeypatch.setattr(running, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: mine + owner)
    monkeypatch.setenv(running.COMPILED, "")
    monkeypatch.delenv(running.COMPILED)
    running._compile_apart_from_others()
    assert (running.COMPILED in os.environ) is left
    monkeypatch.setenv(running.COMPILED, "mine")
    running._compile_apart_from_others()
    assert os.environ[running.COMPILED] == "mine"


# --- tables, rows, options ---


def evil_schema(marker: Path) -> Any:
    """A column of a type that earlier versions of pyarrow unpickled."""
    described = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    pandas = {"pandas": pickle.dumps(Payload(marker)), "minicache": pickle.dumps(Payload(marker))}
    return pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), metadata=described)], metadata=pandas)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_with_a_pickled_type_is_read_as_data(tmp_path: Path, marker: Path, kind: str) -> None:
    table = pyarrow.table({"prompt": ["a"]}, schema=evil_schema(marker))
    file = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    assert [row for _, row in read_rows(str(file))] == [{"prompt": "a"}]
    if kind == "parquet":
        with pytest.raises(MinicacheError, match="its document cannot be read"):
            read_document(str(file))
    assert not marker.exists()


def yaml_payload(marker: Path) -> str:
    return f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]"


# Ten lines that stand for a hundred thousand million values.
ALIASES = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{at + 1}: &a{at + 1} [{','.join([f'*a{at}'] * 10)}]\n" for at in range(11)
)


@pytest.mark.parametrize("kind", ["code", "aliases", "aliases in a list", "itself"])
def test_yaml_with_a_payload_is_refused(tmp_path: Path, marker: Path, kind: str) -> None:
    bombs = {"code": f"lr: {yaml_payload(marker)}\n", "aliases": ALIASES, "itself": "lr: &a [*a]\n"}
    text = bombs.get(kind) or "".join(f"- {line.partition(': ')[2]}\n" for line in ALIASES.splitlines())
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        options_in(tmp_path / "options.yaml", "train", {}, {"lr": "lr"})
    readme = f"---\nconfigs:\n- config_name: x\n  data_files: a\n  more:\n    {text.replace(chr(10), chr(10) + '    ')}\n---\n"
    folder = Folder("theirs", ["README.md", "a.jsonl"], lambda name: readme)
    with pytest.raises(MinicacheError, match="no YAML"):
        folder.select("", "", lambda line: None)
    assert not marker.exists()


def test_names_of_many_parts_are_refused(tmp_path: Path) -> None:
    """They cost tomllib the square of their number in memory."""
    (tmp_path / "options.toml").write_text("a." * 100_000 + "a = 1\n")
    with pytest.raises(ConfigError, match="a few parts"):
        options_in(tmp_path / "options.toml", "train", {}, {})
    (tmp_path / "options.toml").write_text("a" * 900_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        options_in(tmp_path / "options.toml", "train", {}, {})


# --- caches ---

BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
CRC, ZSTD = {"name": "crc32c"}, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
SHARDED = {"chunk_shape": [1, 8, 3], "codecs": [BYTES], "index_codecs": [BYTES, CRC], "index_location": "end"}
CODECS: dict[str, list[Any]] = {
    "gzip": [BYTES, {"name": "gzip", "configuration": {"level": 1}}, CRC],
    "numcodecs": [BYTES, {"name": "numcodecs.bz2", "configuration": {"level": 1}}, CRC],
    "blosc": [BYTES, {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "noshuffle",
              "typesize": 4, "blocksize": 0}}, CRC],
    "transpose": [{"name": "transpose", "configuration": {"order": [0, 1, 2]}}, BYTES, CRC],
    "text": [{"name": "vlen-utf8"}],
    "zstd": [BYTES, ZSTD, CRC],
    "big": [{"name": "bytes", "configuration": {"endian": "big"}}, CRC],
    "no checksum": [BYTES],
    "sharded": [{"name": "sharding_indexed", "configuration": SHARDED}],
    "a module's": [BYTES, {"name": "evil_codec.A", "configuration": {}}, CRC],
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, ref_cache: Path) -> Path:
    return Path(shutil.copytree(ref_cache, tmp_path / "cache"))


@pytest.mark.parametrize("name", CODECS)
def test_an_array_in_other_codecs_is_refused(
    cache: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "evil_codec.py").write_text(code(marker))
    monkeypatch.syspath_prepend(tmp_path)
    change(cache / "pairs/lengths/zarr.json", codecs=CODECS[name])
    with pytest.raises(CacheDamaged, match="pairs/lengths: ") as error:
        ReferenceCache(cache)
    assert "\n" not in str(error.value) and not marker.exists()


def test_payloads_would_run_where_they_are_trusted(tmp_path: Path, marker: Path) -> None:
    """Else the tests here would show nothing."""
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()
    marker.unlink()
    exec(code(marker), {})
    assert marker.exists()


def test_an_array_in_the_codecs_that_this_program_writes_is_read(cache: Path) -> None:
    change(cache / "pairs/lengths/zarr.json", codecs=[BYTES, CRC])
    assert ReferenceCache(cache).log.pairs == 40


def with_log(cache: Path, **entries: Any) -> None:
    """Change the manifest's log, and its digest with it."""
    file = cache / "zarr.json"
    content = json.loads(file.read_text())
    manifest = content["attributes"]["minicache"]
    manifest["log"].update(entries)
    manifest["digest"] = digest_of({"identity": manifest["identity"], "log": manifest["log"]})
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["blocks", "pairs", "shards"])
@pytest.mark.parametrize("number", [2**45, 2**62, 2**64, -1, 1e300])
def test_numbers_of_a_manifest_that_no_cache_has_are_refused(cache: Path, name: str, number: float) -> None:
    with_log(cache, **{name: number})
    with pytest.raises(CacheDamaged, match=rf"log\.{name}: expected"):
        ReferenceCache(cache)


def test_a_manifest_that_counts_millions_of_missing_blocks_is_not_believed(cache: Path, cli: Cli) -> None:
    with_log(cache, blocks=MOST_BLOCKS)
    code, _, err = cli("inspect-cache", cache)
    assert code == 1 and "more than 100,000 blocks have no pairs" in " ".join(err.split())


@pytest.mark.parametrize("name", ["claim", "pairs", "pairs/tokens", "pairs/tokens/c", "ref/logp_mean/c/0"])
def test_a_link_in_a_cache_makes_nothing_outside_of_it(
    cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, name: str
) -> None:
    """Stage one goes on with a cache that lacks a block of pairs and one of scores: it would write where the link leads."""
    outside, linked = tmp_path / "outside", cache / name
    if linked.is_dir():
        shutil.move(linked, outside)
    else:
        linked.unlink(missing_ok=True)
    linked.symlink_to(outside)
    for missing in ("ref/logp_mean/c/0", "pairs/tokens/c/1"):
        for chunk in list((cache / missing).rglob("*")):
            if chunk.is_file():
                chunk.unlink()
    before = sorted(tmp_path.rglob("outside/**/*")), outside.exists()
    with pytest.raises(OutputError, match=r"leads out of the cache|claim: cannot be written") as error:
        precompute_into(cache, model_dir, data_file)
    assert "\n" not in str(error.value)
    assert (sorted(tmp_path.rglob("outside/**/*")), outside.exists()) == before


# --- a pickle in place of any file ---


# Kind of place -> commands that read all of its files. Checkpoints are in training/test_hostile_checkpoint.py.
READ: dict[str, list[list[str]]] = {
    "model": [["precompute-ref", "--model", "PLACE", "--data", "rows.jsonl", "--ref-cache", "made"]],
    "run": [["evaluate", "--policy", "PLACE", "--ref-cache", "CACHE"], ["report", "PLACE"]],
    "cache": [["inspect-cache", "PLACE", "--verify"]],
}
ROWS = ("jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "jsonl.gz", "jsonl.zst", "csv.bz2", "tsv.xz")


@pytest.mark.parametrize("kind", READ)
def test_a_pickle_in_place_of_any_file_is_not_run(
    kind: str, marker: Path, model: Path, cache: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the exit codes are."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("rows.jsonl"), make_rows(2))
    place, kept = {"model": model, "cache": cache, "run": tmp_path / "run"}[kind], shutil.copytree(cache, "kept")
    if kind == "run":
        train(TrainConfig(cache, place, max_steps=2, save_every=0, batch_size=8), one_process(), Silent())
        for name in ("trackers.json", "answers.jsonl"):
            (place / name).touch()
    files = [file for file in sorted(place.rglob("*")) if file.is_file() and file.name != "1"]
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Payload(marker)))
        for words in READ[kind]:
            cli(*({"PLACE": place, "CACHE": kept}.get(word, word) for word in words))
            shutil.rmtree("made", ignore_errors=True)
            assert not marker.exists(), (file, words)
        file.write_bytes(content)


@pytest.mark.parametrize("suffix", ROWS)
def test_a_pickle_in_place_of_rows_is_not_run(
    suffix: str, marker: Path, tmp_path: Path, model_dir: Path, cli: Cli
) -> None:
    file, content = tmp_path / f"rows.{suffix}", pickle.dumps(Payload(marker))
    packed: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstd.compress,
    }
    for pack in {packed.get(suffix.rpartition(".")[2], bytes), bytes}:
        file.write_bytes(pack(content))
        code, _, err = cli("precompute-ref", "--model", model_dir, "--data", file, "--ref-cache", tmp_path / "cache")
        assert code == 1 and "error: " in err and not marker.exists()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--policy", "MODEL", "--reference", "OTHER", "--prompt", "a", "--max-new-tokens", "1",
         "--judge", "http://127.0.0.1:1/v1", "--judge-model", "m", "--verdicts", "FILE"],
        ["compare", "--policy", "MODEL", "--prompts", "FILE"],
        ["sweep", "--ref-cache", "CACHE", "--out", "PLACE", "--beta", "1,2", "--holdout", "0.2"],
        ["train", "--ref-cache", "CACHE", "--out", "made", "--config", "FILE"],
        ["import-cache", "FILE", "--model", "MODEL", "--ref-cache", "made"],
    ],
    ids=["verdicts", "prompts", "sweep.json", "config", "table"],
)  # fmt: skip
def test_a_pickle_in_place_of_what_a_command_reads_is_refused(
    words: list[str],
    marker: Path,
    tmp_path: Path,
    model: Path,
    ref_cache: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("json", "jsonl", "yaml", "toml", "parquet") if words[0] != "sweep" else ("",):
        file = tmp_path / (f"file.{suffix}" if suffix else "sweep.json")
        for each in {file, file.with_name(f"{file.name}.minicache.json")}:
            each.write_bytes(pickle.dumps(Payload(marker)))
        named = {"MODEL": model, "OTHER": model, "CACHE": ref_cache, "FILE": file, "PLACE": tmp_path}
        code, _, err = cli(*(named.get(word, word) for word in words))
        assert code == 1 and "error: " in err and not marker.exists(), (file, err)


def test_a_judges_answer_that_is_a_pickle_is_not_run(marker: Path) -> None:
    content = pickle.dumps(Payload(marker))
    with pytest.raises(Again, match="answers no JSON object"):
        Connection("http://127.0.0.1:1/v1", Key(""))._object(content)
    assert not marker.exists()


# --- names ---

LONG = "n" * 256
COMMANDS = [
    ("inspect-cache", LONG),
    ("report", LONG),
    ("diff", LONG, LONG),
    ("train", "--ref-cache", LONG, "--out", "run"),
    ("train", "--ref-cache", "CACHE", "--out", LONG),
    ("train", "--ref-cache", "CACHE", "--out", "run", "--init-from", LONG),
    ("train", "--ref-cache", "CACHE", "--out", "run", "--config", f"{LONG}.toml"),
    ("evaluate", "--ref-cache", "CACHE", "--policy", LONG),
    ("precompute-ref", "--model", LONG, "--data", "rows.jsonl", "--ref-cache", "c"),
    ("compare", "--policy", LONG, "--prompts", "rows.jsonl"),
    ("plot", LONG, "--out", "a.png"),
    ("fit", "--model", LONG),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_name_of_256_bytes_is_one_line(
    cache: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    code, _, err = cli(*(str(cache) if word == "CACHE" else word for word in words))
    assert code == 1 and "error: " in err and "Traceback" not in err


# --- pictures ---

DRAWN = """
from pathlib import Path
from minicache.pictures.frame import frame, picture
with picture(Path("a.png"), (2, 2)) as figure:
    frame(figure.subplots(), "title", "step", "loss")
"""


def test_a_matplotlibrc_of_the_working_directory_starts_no_program(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\immediate\\write18{x}\n")
    for name in ("latex", "dvipng", "pdflatex"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    given = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-P", "-c", DRAWN], cwd=tmp_path, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file() and not marker.exists()


# --- files that are read whole ---

# What reads a stranger's file whole, and the file below a folder.
WHOLE: dict[str, Callable[[Path], Any]] = {
    "run.json": read_record,
    "metrics.jsonl": read_curves,
    "answers.jsonl": lambda folder: read_answers(folder / "answers.jsonl"),
    "verdicts.jsonl": lambda folder: read_verdicts(folder / "verdicts.jsonl"),
    "table.jsonl.minicache.json": lambda folder: read_document(str(folder / "table.jsonl")),
    "chat_template.jinja": own_template,
    "adapter_config.json": require_plain_files,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_of_a_terabyte_that_takes_no_disk_is_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(MinicacheError, match=r"has 1,099,511,627,776 bytes"):
        WHOLE[name](tmp_path)


@pytest.mark.parametrize("name", ["answers.jsonl", "verdicts.jsonl", "adapter_config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(MinicacheError, match="expected a file"):
        WHOLE[name](tmp_path)
