"""What reads files that may be a stranger's, each with inputs to begin with: an error of ours is an answer, any other is a fault.

A target is given bytes, puts them where a user's file would lie, and reads them as the commands do. `fuzz.py` makes the bytes;
tests/test_fuzz_inputs.py reads those that are kept, the ones that once were faults among them.
"""

import base64
import csv
import gzip
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from minicache.cache.identity import FORMAT_VERSION, digest_of
from minicache.cache.manifest import Manifest
from minicache.cache.reader import ReferenceCache
from minicache.data.columns import Reading
from minicache.data.files import DELIMITERS, read_rows, zstd
from minicache.data.formats import to_pairs, to_prompt
from minicache.data.records import Turn
from minicache.data.template import Template
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheError, ConfigError, MinicacheError, RowRefused
from minicache.judge.question import verdict_of
from minicache.judge.verdicts import read_verdicts
from minicache.models.adapter_files import ADAPTER, settings_of
from minicache.options.config_file import options_in
from minicache.options.exchange import ExportCacheConfig, ImportConfig
from minicache.options.others import ReportConfig
from minicache.reports.contents import read_cache
from minicache.stages.export_cache import export_cache
from minicache.stages.import_cache import import_cache
from minicache.stages.report import write_run_page
from minicache.trackers import Silent
from minicache.training.run_directory import read_record
from minicache.training.shard_index import read_index

SAMPLE = Path(__file__).parents[2] / "minicache" / "sample" / "train.jsonl"
GOLDEN = Path(__file__).parents[1] / "golden" / "v0.1.0"
MESSAGES = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"))


@dataclass(frozen=True)
class Target:
    """read: what reads bytes, in a directory that it may write to. inputs: to begin with."""

    read: Callable[[bytes, Path], object]
    inputs: list[bytes]

    def __call__(self, content: bytes, place: Path) -> None:
        """Read bytes. Raises what is no error of ours: a fault."""
        with suppress(MinicacheError):
            self.read(content, place)


def made(place: Path) -> dict[str, Target]:
    """The targets, by name. place: a directory for what they need: a small cache, its table, a run."""
    from tests.conftest import make_rows, precompute_into, save_tokenizer, tiny_llama, write_jsonl

    model = place / "model"
    model.mkdir()
    save_tokenizer(model)
    tiny_llama().save_pretrained(model)
    data = write_jsonl(place / "rows.jsonl", make_rows(3))
    cache = precompute_into(place / "cache", model, data, block_pairs=2, per_token=True)
    for kind in ("jsonl", "parquet"):
        export_cache(ExportCacheConfig(cache, place / f"table.{kind}"), Silent())
    return {
        "rows": Target(_rows, _row_inputs()),
        "manifest": Target(_manifest, [json.dumps({"identity": IDENTITY, "log": LOG}).encode()]),
        "chunks": _chunks(cache),
        "run": _run(),
        "metrics": Target(_metrics, [(GOLDEN / "run" / "metrics.jsonl").read_bytes()]),
        "table": _table(place / "table.jsonl"),
        "adapter": Target(_adapter, [json.dumps(each).encode() for each in ADAPTERS]),
        "template": Target(_template, [each.encode() for each in TEMPLATES]),
        "tokenizer": _tokenizer(model),
        "options": Target(
            _options,
            [b"0beta: [1, 2]\nlr: 1e-6\n", b"1beta = 0.1\n[train]\nlr = 1e-6\n", b'2{"beta": "0.1", "lr": null}'],
        ),
        "verdicts": Target(_verdicts, VERDICTS),
        "index": Target(_index, [next((GOLDEN / "run").rglob(".metadata")).read_bytes()]),
    }


# --- rows and manifests ---

IDENTITY = {
    "format_version": FORMAT_VERSION, "weights": "w", "family": "llama", "tokenizer": "t", "template": "p", "vocabulary": 400,
    "max_length": 32, "truncate": "right", "loss_on": "response", "think": "keep", "dtype": "float32", "attention": "sdpa",
    "block_pairs": 4, "per_token": True,
}  # fmt: skip
LOG = {
    "model": "m", "created": "2026-01-01", "versions": {"a": "1"}, "blocks": 1, "pairs": 1, "shards": 0,
    "sources": [{"name": "f", "size": 1, "sha256": "s", "rows": 1, "kept": 1, "refused": {"x": 1}, "complete": True}],
}  # fmt: skip


OTHER_FORMS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b", "label": True},
    {"instruction": "a", "input": "b", "output": ["c", "d"], "history": [["e", "f"]]},
    {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2.5]},
    {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "chosen": [
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        ],
        "rejected": [{"role": "assistant", "content": "c"}],
        "tools": [],
    },
]
TABLES: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": 'b\n"c"', "rejected": "d"},
    {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
        "score": 1.5,
    },
]
SUFFIXES = ("", ".csv", ".tsv", ".parquet", ".arrow")


def forms() -> list[dict[str, Any]]:
    """A row of each form, and of each published layout of it."""
    from tests.data.test_layouts import LAYOUTS

    return [*(layout.row for layout in LAYOUTS.values()), *OTHER_FORMS]


def _row_inputs() -> list[bytes]:
    """The first byte says which suffix the file has."""
    lines = SAMPLE.read_bytes().splitlines()[:2]
    rows = [json.dumps(row).encode() for row in forms()]
    plain = [b"\n".join(lines), b"[" + b",".join(lines) + b"]", *rows]
    packed = [gzip.compress(rows[0]), zstd.compress(rows[0])]
    return [b"\0" + each for each in (*plain, *packed)] + [
        bytes([number]) + as_table(row, suffix) for number, suffix in enumerate(SUFFIXES) if suffix for row in TABLES
    ]


def as_table(row: dict[str, Any], suffix: str) -> bytes:
    """A table of one row."""
    if suffix in DELIMITERS:
        cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        text = StringIO()
        csv.writer(text, delimiter=DELIMITERS[suffix]).writerows([row, cells])
        return text.getvalue().encode()
    table, file = pyarrow.Table.from_pylist([row]), BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


def _rows(content: bytes, place: Path) -> None:
    file = place / f"rows{SUFFIXES[content[0] % len(SUFFIXES)] if content else ''}"
    file.write_bytes(content[1:])
    for line, row in read_rows(str(file)):
        for read in (to_pairs, in_ranks, lambda row, *_: to_prompt(row)):
            with suppress(RowRefused):
                read(row, "f", line)


def in_ranks(row: object, file: str, line: int) -> object:
    return to_pairs(row, file, line, Reading(pairs="best-worst"))


def _manifest(content: bytes, place: Path) -> None:
    try:
        found = json.loads(content)
        digest = digest_of({"identity": found["identity"], "log": found.get("log")})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    with suppress(CacheError):
        assert Manifest.from_attributes({"minicache": {**found, "digest": digest}}, "here").identity.digest


# --- caches and tables ---


def _chunks(cache: Path) -> Target:
    """The first byte says which file of a cache the others replace: a chunk, a ledger, a zarr.json."""
    files = sorted(
        file for file in cache.rglob("*") if file.is_file() and file.relative_to(cache).parts[0] != "tokenizer"
    )

    def read(content: bytes, place: Path) -> None:
        file = files[content[0] % len(files)] if content else files[0]
        before = file.read_bytes()
        file.write_bytes(content[1:])
        try:
            with suppress(MinicacheError):
                assert read_cache(cache).inspection.path
            list(ReferenceCache(cache).verify())
        finally:
            file.write_bytes(before)

    return Target(read, [bytes([number]) + file.read_bytes() for number, file in enumerate(files)])


def _table(table: Path) -> Target:
    """A line, then rows: the document of a table, and the table. After an empty line it is a parquet, which holds its document."""
    beside = table.with_name(f"{table.name}.minicache.json")
    document = json.loads(beside.read_text(encoding="utf-8"))

    def read(content: bytes, place: Path) -> None:
        first, _, rows = content.partition(b"\n")
        file = place / ("table.jsonl" if first else "table.parquet")
        file.write_bytes(rows)
        (place / beside.name).write_bytes(first)
        try:
            found = json.loads(first) if first else document
            signed = found["minicache"]
            signed["digest"] = digest_of({"identity": signed["identity"], "log": signed.get("log")})
            identity = digest_of(signed["identity"])
            (place / beside.name).write_text(json.dumps(found), encoding="utf-8")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            identity = "x"
        try:
            import_cache(ImportConfig(str(file), place / "imported", identity=identity), Silent())
        finally:
            shutil.rmtree(place / "imported", ignore_errors=True)

    whole = json.dumps(document).encode() + b"\n" + table.read_bytes()
    return Target(read, [whole, b"\n" + table.with_suffix(".parquet").read_bytes()])


# --- runs ---


def _run() -> Target:
    def read(content: bytes, place: Path) -> None:
        run = place / "run"
        run.mkdir(exist_ok=True)
        shutil.copy(GOLDEN / "run" / "metrics.jsonl", run)
        (run / "run.json").write_bytes(content)
        with suppress(MinicacheError):
            read_record(run)
        write_run_page(ReportConfig(run))

    files = [*GOLDEN.rglob("run.json"), *GOLDEN.glob("*run*.json")]
    return Target(read, [file.read_bytes() for file in files])


def _metrics(content: bytes, place: Path) -> None:
    run = place / "run"
    run.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "run" / "run.json", run)
    (run / "metrics.jsonl").write_bytes(content)
    write_run_page(ReportConfig(run))


def _index(content: bytes, place: Path) -> None:
    file = place / ".metadata"
    file.write_bytes(content)
    # the caller's to turn into a line
    with suppress(ValueError, OSError):
        read_index(file)


VERDICTS = [
    b'{"digest": "d", "model": "m", "policy_is_a": true, "verdict": "A", "reply": "[[A]]", "is_cut": false, "max_tokens": 9}\n',
    b'{"choice": "A"}\n{"digest"',
    b"[[A]]",
]


def _verdicts(content: bytes, place: Path) -> None:
    file = place / "verdicts.jsonl"
    file.write_bytes(content)
    verdict_of(content.decode(errors="replace"))
    read_verdicts(file)


# --- models, templates, options ---

ADAPTERS: list[dict[str, Any]] = [
    {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    },
    {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": "all-linear",
        "rank_pattern": {"q": 4},
        "modules_to_save": ["lm_head"],
        "use_dora": True,
    },
    {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
]
TEMPLATES = [
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{%- if tools %}{{ tools | tojson }}{% endif %}{% set ns = namespace(a=0) %}{% for m in messages[::-1] %}"
    "{% set ns.a = ns.a + 1 %}"
    "{{ loop.index0 }}{{ m.content.split('x')[-1] }}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    "{% macro f(a) %}{{ a * 3 }}{% endmacro %}{{ f('x') }}{{ '%5s' % 'a' }}{{ strftime_now('%Y') }}"
    "{% generation %}{% endgeneration %}",
]  # fmt: skip


def _adapter(content: bytes, place: Path) -> None:
    folder = place / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / ADAPTER).write_bytes(content)
    settings_of(folder)


def _template(content: bytes, place: Path) -> None:
    template = Template(content.decode(errors="replace"), {"bos_token": "<s>", "eos_token": "</s>"})
    assert isinstance(template.render(MESSAGES), str)
    assert template.variables is not None and template.switches is not None


def _tokenizer(model: Path) -> Target:
    """The first byte says which of a tokenizer's files the others replace."""
    names = ("tokenizer.json", "tokenizer_config.json")

    def read(content: bytes, place: Path) -> None:
        folder = place / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name in names:
            shutil.copy(model / name, folder)
        (folder / names[content[0] % 2 if content else 0]).write_bytes(content[1:])
        tokenizer = ChatTokenizer.load(folder)
        with suppress(RowRefused):
            tokenizer.encode([tokenizer.render(MESSAGES)])

    return Target(read, [bytes([number]) + (model / name).read_bytes() for number, name in enumerate(names)])


def _options(content: bytes, place: Path) -> None:
    """The first byte says in which format the others are."""
    file = place / f"options.{('yaml', 'toml', 'json')[content[0] % 3] if content else 'json'}"
    file.write_bytes(content[1:])
    with suppress(ConfigError):
        options_in(file, "train", {"train": 0, "sweep": 0}, {"beta": "beta", "lr": "lr"})


def kept(folder: Path) -> list[tuple[str, bytes]]:
    """The inputs that are kept, with their target's name: text as it is, other bytes in base64."""
    found = []
    for file in sorted(folder.glob("*/*")):
        content = file.read_bytes()
        found.append((file.parent.name, base64.b64decode(content) if file.suffix == ".b64" else content))
    return found
