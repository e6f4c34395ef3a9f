"""Whatever stands in a row, a name, a manifest or a run: no control character of it reaches a terminal, a pipe or a file."""

import json
import logging
import os
import pty
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from minicache.cache.identity import digest_of
from minicache.json_lines import to_json
from minicache.options.train import TrainConfig
from minicache.screen.console import Lines, SafeConsole
from minicache.stages.train import train
from minicache.text import GuardedStream, visible
from minicache.trackers import Silent
from tests.conftest import make_rows, one_process, write_jsonl
from tests.stages.test_crash import FORKS

# C0 but for tab and line feed, DEL, C1, Unicode's Bidi_Control, separators of lines and paragraphs
CODES = [
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x61C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
]
EVERY = "".join(map(chr, CODES))
# A title, a colour that this program never uses, a link, the cursor sent home; the same by C1.
SEQUENCES = (
    "\x1b]0;owned\x07\x1b[38;5;123mred\x1b]8;;http://x\x1b\\\x1b[H\x9b31m\x9d0;t\x9c [bold red]b[/] [/x] :smile:"
)
NASTY = f"{EVERY}{SEQUENCES}"
# The command line of a process holds no U+0000.
ARGUMENT = NASTY.replace("\0", "")
# A name may not hold a slash, and 255 bytes at most.
NAME = "\x1b]0;t\x07\x1b[38;5;123m\x9b31m\u202e\u2066\x7f\r[bold]"
# What rich sends: colours and styles, the cursor up, hidden and shown, a line erased.
OURS = re.compile(r"\x1b\[(?:[\d;]*m|\d*A|2K|\?25[lh])|\r")
FOREIGN = re.compile(r"\x1b\[38;5;123|\x1b\]")
UNSAFE = re.compile("[" + "".join(map(re.escape, EVERY)) + "]")


def require_clean(shown: str, in_terminal: bool = False) -> None:
    assert not FOREIGN.search(shown)
    if in_terminal:
        shown = OURS.sub("", shown)
    found = UNSAFE.search(shown)
    assert not found, (hex(ord(found[0])), shown[max(0, found.start() - 60) : found.end() + 20])


def test_every_control_is_shown_and_nothing_else_changes() -> None:
    assert visible("plain 你好\n\t😀 é ﷽ ا\u200dب") == "plain 你好\n\t😀 é ﷽ ا\u200dب"
    assert len(visible(EVERY)) == len(EVERY) and not UNSAFE.search(visible(EVERY))
    assert visible("\0\x1b\x07\x7f\x85\u202e\udcff") == "␀␛␇␡���"


def test_json_escapes_them_and_loses_nothing() -> None:
    value = {"名" + NASTY: [NASTY, {"\udcff": "é"}]}
    text = to_json(value, indent=2)
    require_clean(text)
    text.encode()
    assert json.loads(text) == value and "名" in text and "é" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_shows_them_in_whatever_is_printed(terminal: bool) -> None:
    file = StringIO()
    console = SafeConsole(file=file, force_terminal=terminal, width=200)
    table = Table(title=NASTY, caption=NASTY)
    table.add_column(NASTY)
    table.add_row(NASTY)
    linked = Text("here", style="bold link http://x")
    for each in (NASTY, Text(NASTY), Text.assemble((NASTY, "bold red"), linked), table, [NASTY], RuntimeError(NASTY)):
        console.print(each)
    console.out(NASTY)
    require_clean(file.getvalue(), terminal)
    assert "[bold red]b[/] [/x] :smile:" in file.getvalue()


def test_a_stream_shows_what_libraries_logs_and_tracebacks_write(monkeypatch: pytest.MonkeyPatch) -> None:
    under = TextIOWrapper(BytesIO(), encoding="utf-8")
    stream = GuardedStream(under)
    monkeypatch.setattr(sys, "stderr", stream)
    print(NASTY, file=sys.stderr)
    sys.stderr.writelines([NASTY, NASTY])
    handler = logging.StreamHandler(sys.stderr)
    handler.emit(logging.makeLogRecord({"msg": NASTY}))
    sys.excepthook(ValueError, ValueError(NASTY), None)
    under.flush()
    written = under.buffer.getvalue().decode()
    require_clean(written)
    assert written.count("␛]0;owned␇") == 5
    assert sys.stderr.encoding == "utf-8" and not sys.stderr.isatty()


def test_what_libraries_write_below_a_live_display_has_no_codes_either() -> None:
    file = StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=200)
    lines = Lines(console, GuardedStream(TextIOWrapper(BytesIO())))
    lines.write(NASTY + "\n")
    lines.flush()
    require_clean(file.getvalue(), in_terminal=True)
    assert "owned" in file.getvalue()


# --- the whole program ---


def on_terminal(arguments: list[str], place: str) -> None:
    """The program, with a terminal as its output."""
    terminal = os.open(place, os.O_WRONLY)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(terminal), "w", encoding="utf-8") for _ in range(2))
    os.environ["TERM"] = "xterm-256color"
    sys.argv = ["minidpo", *arguments]
    from minicache.cli import main

    main()


class Shown:
    """Commands of the real program, on a terminal and in a pipe, and what came out of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: object, code: int | None = 0) -> str:
        """What a command shows in a terminal."""
        master, slave = pty.openpty()
        os.set_inheritable(slave, True)
        place = os.ttyname(slave)
        shown = bytearray()
        reader = Thread(target=self._read, args=(master, shown))
        process = FORKS.Process(target=on_terminal, args=([str(each) for each in arguments], place))
        reader.start()
        process.start()
        process.join(120)
        os.close(slave)
        reader.join()
        os.close(master)
        text = shown.decode()
        assert code is None or process.exitcode == code, text
        assert "Traceback" not in text, text
        require_clean(text, in_terminal=True)
        return text

    @staticmethod
    def _read(master: int, shown: bytearray) -> None:
        # EIO: nobody has it open any more
        try:
            while more := os.read(master, 65536):
                shown += more
        except OSError:
            pass


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    return Shown(tmp_path)


def spoiled(tree: Any, keys: bool = True) -> Iterator[Any]:
    """JSON with one of its texts replaced, or with one of its keys."""
    if isinstance(tree, str):
        yield NASTY
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        for inner in spoiled(tree[key], keys):
            yield {**tree, key: inner} if isinstance(tree, dict) else [*tree[:key], inner, *tree[key + 1 :]]
        if keys and isinstance(tree, dict):
            yield {NASTY if name == key else name: value for name, value in tree.items()}


CALL = [{"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]
FULL: dict[str, Any] = {
    "system": "s",
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"a": {"type": "t"}}}}],
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "chosen": [{"role": "assistant", "content": "b", "tool_calls": CALL}, {"role": "tool", "content": "c", "name": "f"},
               {"role": "assistant", "content": "d", "reasoning_content": "e"}],
    "rejected": [{"role": "assistant", "content": "f"}],
    "chat_template_kwargs": {"enable_thinking": "no"},
    "other": "g",
}  # fmt: skip


def nasty_rows() -> list[dict[str, Any]]:
    rows = [
        {**row, "chosen": [*row["chosen"][:-1], {"role": "assistant", "content": f"{NASTY} {number} yes"}]}
        for number, row in enumerate(make_rows(12))
    ]
    return [*rows, {"prompt": NASTY, "chosen": NASTY, "rejected": NASTY}, {NASTY: 1}, *spoiled(FULL)]


@pytest.mark.slow
def test_the_program_on_a_terminal(shown: Shown, model_dir: Path, tmp_path: Path) -> None:
    """Names of directories and files, texts of rows, reasons of refusals; every command that shows them."""
    here = tmp_path / NAME
    here.mkdir()
    model = shutil.copytree(model_dir, here / f"model{NAME}")
    data = write_jsonl(here / f"rows{NAME}.jsonl", nasty_rows())
    cache, run = here / f"cache{NAME}", here / f"run{NAME}"
    short = ["--max-length", 256, "--block-pairs", 8]
    said = shown("precompute-ref", "--model", model, "--data", data, "--ref-cache", cache, *short)
    assert "␛]0;t" in said
    assert "␛]0;owned" in shown("inspect-cache", cache, "--pair", 0)
    shown("inspect-cache", cache)
    shown("inspect-cache", cache, "--json")
    shown("inspect-cache", cache, "--verify", "--model", model)
    shown("train", "--ref-cache", cache, "--out", run, "--max-steps", 2, "--log-every", 1)
    shown("evaluate", "--policy", run, "--ref-cache", cache)
    shown("evaluate", "--policy", run, "--ref-cache", cache, "--json")
    shown("compare", "--policy", run, "--prompt", ARGUMENT, "--max-new-tokens", 2)
    shown("compare", "--policy", run, "--prompt", ARGUMENT, "--max-new-tokens", 2, "--json")
    other = write_jsonl(here / f"more{NAME}.jsonl", make_rows(4, seed=3))
    shown("precompute-ref", "--model", model, "--data", other, "--ref-cache", here / f"other{NAME}", *short)
    shown("merge", cache, here / f"other{NAME}", "--ref-cache", here / f"merged{NAME}")
    shown("diff", cache, here / f"merged{NAME}")
    shown("export", "--ref-cache", cache, "--out", here / f"table{NAME}.parquet")
    shown("export", "--policy", run, "--out", here / f"policy{NAME}")
    shown(
        "sweep",
        "--ref-cache",
        cache,
        "--out",
        here / f"sweep{NAME}",
        "--beta",
        "1,2",
        "--max-steps",
        1,
        "--holdout",
        0.3,
    )
    shown("report", run, "--out", here / f"report{NAME}.html")
    shown("inspect-cache", cache, "--html", here / f"cache{NAME}.html")
    shown("plot", run, "--out", here / f"curves{NAME}.svg")
    for arguments, code in (
        (["train", "--ref-cache", cache, "--out", run], 1),
        (["inspect-cache", here / f"none{NAME}"], 1),
        (
            ["precompute-ref", "--model", here / ARGUMENT.replace("/", "_")[:60], "--data", data, "--ref-cache", cache],
            1,
        ),
        ([ARGUMENT], 2),
        (["train", f"--{ARGUMENT}"], 2),
        (["train", "--ref-cache", cache, "--out", run, "--loss", ARGUMENT], None),
        (["train", "--ref-cache", cache, "--out", run, "--beta", ARGUMENT], 2),
    ):
        shown(*arguments, code=code)
    texts_ = [file for file in here.rglob("*") if file.suffix in (".json", ".jsonl", ".html", ".md", ".svg")]
    for file in texts_:
        if file != data and not file.is_relative_to(model) and "tokenizer" not in str(file.relative_to(here)):
            require_clean(file.read_text())


def test_every_text_of_a_manifest(ref_cache: Path, tmp_path: Path, cli: Any) -> None:
    """By one who knows how to sign it: refused or shown, never sent."""
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    root = json.loads((cache / "zarr.json").read_text())
    manifest = root["attributes"]["minicache"]
    content = {key: manifest[key] for key in ("identity", "log")}
    for new in spoiled(content):
        signed = {**new, "identity_digest": digest_of(new.get("identity")), "digest": digest_of(new)}
        (cache / "zarr.json").write_text(json.dumps({**root, "attributes": {"minicache": signed}}))
        for arguments in (["inspect-cache", cache], ["inspect-cache", cache, "--json"], ["diff", cache, ref_cache]):
            _, out, err = cli(*arguments)
            require_clean(out + err)


@pytest.fixture(scope="module")
def run(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps. Nothing of what is shown here changes it."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(TrainConfig(ref_cache, out, max_steps=2, log_every=1), one_process(), Silent())
    return out


@pytest.fixture
def shown_of(cli: Any, run: Path, tmp_path: Path) -> Callable[..., None]:
    """Writes JSON, or lines of it, as a file of the run; commands that read it send no control, nor does the page hold one."""
    own = shutil.copytree(run, tmp_path / "run")

    def show(name: str, content: Any, *commands: list[object]) -> None:
        whole = (own / name).read_bytes() if (own / name).exists() else b""
        (own / name).write_text("".join(json.dumps(line) + "\n" for line in content))
        page = own / "page.html"
        page.unlink(missing_ok=True)
        for arguments in commands:
            _, out, err = cli(*(own if word == RUN else page if word == PAGE else word for word in arguments))
            require_clean(out + err)
        require_clean(page.read_text() if page.exists() else "")
        (own / name).write_bytes(whole)

    return show


RUN, PAGE = "the run", "its page"


def test_every_text_of_a_run(run: Path, ref_cache: Path, shown_of: Callable[..., None]) -> None:
    record = json.loads((run / "run.json").read_text())
    resume, evaluate = ["train", "--resume", "--out", RUN], ["evaluate", "--policy", RUN, "--ref-cache", ref_cache]
    for new in spoiled(record, keys=False):
        shown_of("run.json", [new], ["report", RUN, "--out", PAGE], resume, evaluate)
    for new in spoiled(record):
        shown_of("run.json", [new], resume)


def test_every_text_of_what_lies_beside_a_run(run: Path, shown_of: Callable[..., None], tmp_path: Path) -> None:
    report, line = ["report", RUN, "--out", PAGE], json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for new in spoiled({"step": 0, "loss": 0.5, "of a stranger": "text"}):
        shown_of("metrics.jsonl", [{**line, **new}], report, ["plot", RUN, "--out", tmp_path / "a.svg"])
    require_clean((tmp_path / "a.svg").read_text())
    for new in spoiled({"wandb": "a", "trackio": "b"}):
        shown_of("trackers.json", [new], ["train", "--resume", "--out", RUN], report)
    for new in spoiled({"prompt": "a", "reference": "b", "policy": "c", "models": {"reference": "d", "policy": "e"}}):
        shown_of("answers.jsonl", [new], report)


def test_every_text_of_a_sweep(ref_cache: Path, tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "sweep"
    call = ["sweep", "--ref-cache", ref_cache, "--out", out, "--beta", "1,2", "--max-steps", 1, "--holdout", 0.3]
    assert cli(*call)[0] == 0
    report = json.loads((out / "sweep.json").read_text())
    for name in ("reference_pairs_per_second", "swept", "runs"):
        for value in (NASTY, {NASTY: 1}, [NASTY]):
            (out / "sweep.json").write_text(json.dumps({**report, name: value, NASTY: value}))
            _, said, err = cli(*call)
            require_clean(said + err)
