"""The tracking libraries themselves, each in its own offline mode and every life of a run in a process of its own.

What they wrote is read back from their files: wandb's and swanlab's record logs, event files, trackio's database.
"""

import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minicache.errors import ConfigError, OutputError
from minicache.trackers import TRACKERS, JsonLines, RunName, Silent, TrackerGroup, open_trackers
from minicache.trackers.guarded import Guarded
from minicache.trackers.libraries import Library, Wandb

OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "HF_HUB_OFFLINE": "1"}

LIFE = """
import json, os, signal, sys
from pathlib import Path
from minicache.errors import MinicacheError
from minicache.trackers import TrackerGroup, JsonLines, RunName, open_trackers

ask = json.loads(sys.argv[1])
facts = {"lr": 1e-3, "data": ["a.jsonl"], "ref_cache": Path("cache"), "loss_options": {"sft_weight": 0.5}}
run = RunName(Path(ask["directory"]), "minicache", "first", ask["resumed_at"])
try:
    lines = JsonLines(run.directory / "metrics.jsonl", run.resumed_at)
    with TrackerGroup(lines, *open_trackers(ask["names"], run, lambda text: print("NOTE", text, file=sys.stderr))) as trackers:
        trackers.start("training", facts)
        for step in range(ask["first"], ask["last"]):
            trackers.log(step, {"loss": 1 / (step + 1), "rewards/chosen": step / 8})
        if ask["ending"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if ask["ending"] == "error":
            raise RuntimeError("out of memory")
        if ask["ending"] == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
except MinicacheError as error:
    sys.exit(f"REFUSED {error}")
except (RuntimeError, KeyboardInterrupt):
    pass
"""


def live(directory: Path, names: list[str], first: int, last: int, **more: Any) -> subprocess.CompletedProcess[str]:
    """One process of a run that logs the steps first to last - 1."""
    directory.mkdir(exist_ok=True)
    ask = {"directory": str(directory), "names": names, "first": first, "last": last, "ending": "", "resumed_at": None}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "SWANLAB", "TRACKIO"))}
    env |= {
        "HOME": str(directory.parent),
        "TRACKIO_DIR": str(directory.parent / "trackio"),
        **OFFLINE,
        **more.pop("env", {}),
    }
    env = {name: value for name, value in env.items() if value}
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-c", LIFE, json.dumps({**ask, **more})]
    done = subprocess.run(command, env=env, cwd=directory.parent, capture_output=True, text=True, timeout=120)
    assert done.stdout == "", "a library wrote where --json output goes"
    if not more.get("ending"):
        assert done.returncode == 0 and "NOTE" not in done.stderr, done.stderr
    return done


def log_records(file: Path) -> Iterator[bytes]:
    """The records of a LevelDB log with a file header of 7 bytes, as wandb and swanlab keep one."""
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


Told = tuple[list[tuple[int, float, float]], dict[str, Any], list[str]]


def read_wandb(directory: Path) -> Told:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    points, ends = [], []
    config: dict[str, Any] = {}
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, log_records(file)):
            if record.HasField("history"):
                item = {
                    part.key or "/".join(part.nested_key): json.loads(part.value_json) for part in record.history.item
                }
                points.append((item["_step"], item["loss"], item["rewards/chosen"]))
            if record.HasField("run"):
                config |= {part.key: json.loads(part.value_json) for part in record.run.config.update}
            if record.HasField("exit"):
                ends.append(f"{record.exit.exit_code}")
    return points, config, ends


def read_swanlab(directory: Path) -> Told:
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState

    points: dict[int, dict[str, float]] = {}
    config, ends = {}, []
    for file in sorted(directory.glob("swanlog/run-*/*.swanlab")):
        for record in map(Record.FromString, log_records(file)):
            if record.HasField("scalar"):
                point = points.setdefault(record.scalar.step, {})
                point.setdefault(
                    record.scalar.key, record.scalar.value.number
                )  # what `swanlab sync` does: the first counts
            if record.HasField("finish"):
                ends.append(f"{RunState.Name(record.finish.state)} {record.finish.error}".strip())
        config = {
            name: item["value"]
            for name, item in yaml.safe_load((file.parent / "files/config.yaml").read_text()).items()
        }
    return [(step, point["loss"], point["rewards/chosen"]) for step, point in sorted(points.items())], config, ends


def read_tensorboard(directory: Path) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    loss, chosen = events.Scalars("loss"), events.Scalars("rewards/chosen")
    points = [(one.step, one.value, other.value) for one, other in zip(loss, chosen, strict=True)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return points, json.loads(text), []


def read_trackio(directory: Path) -> Told:
    import sqlite3

    with sqlite3.connect(directory.parent / "trackio" / "minicache.db") as base:
        rows = base.execute("select step, metrics from metrics order by id").fetchall()
        (config,) = base.execute("select config from configs").fetchone()
        names = [name for (name,) in base.execute("select distinct run_name from metrics")]
    points = [(step, json.loads(text)["loss"], json.loads(text)["rewards/chosen"]) for step, text in rows]
    return points, json.loads(config), names


READ = {"wandb": read_wandb, "swanlab": read_swanlab, "tensorboard": read_tensorboard, "trackio": read_trackio}
ALL = sorted(TRACKERS)
RUN = RunName(Path("run"), "minicache", "first")


def expected(last: int, first: int = 0) -> list[Any]:
    return [pytest.approx((step, 1 / (step + 1), step / 8)) for step in range(first, last)]


@pytest.mark.parametrize("name", ALL)
def test_two_lives_of_a_run_are_one_run_with_every_point_once(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    live(directory, [name], 0, 5)
    once = (directory / "trackers.json").read_text() if name != "tensorboard" else None
    live(directory, [name], 5, 10, resumed_at=5)
    points, config, _ = READ[name](directory)
    assert points == expected(10)
    facts = {"lr": 1e-3, "data": ["a.jsonl"], "ref_cache": "cache", "loss_options": {"sft_weight": 0.5}}
    assert {key: config[key] for key in facts} == facts
    if once:
        assert (directory / "trackers.json").read_text() == once
        own_id = json.loads(once)[name]
        assert name == "trackio" or all(own_id in file.name for file in directory.glob("*/*run-*"))


@pytest.mark.parametrize("name", ["swanlab", "tensorboard", "trackio"])
def test_a_run_killed_after_its_checkpoint_has_every_point_once(name: str, tmp_path: Path) -> None:
    live(tmp_path / "run", [name], 0, 8, ending="killed")
    live(tmp_path / "run", [name], 5, 10, resumed_at=5)
    assert READ[name](tmp_path / "run")[0] == expected(10)


@pytest.mark.parametrize("name", ["swanlab", "trackio"])
def test_points_lost_in_a_buffer_are_told_when_the_run_goes_on(name: str, tmp_path: Path) -> None:
    live(tmp_path / "run", [name], 0, 8, ending="killed")
    live(tmp_path / "run", [name], 8, 10, resumed_at=8)
    assert READ[name](tmp_path / "run")[0] == expected(10)


@pytest.mark.parametrize("name", ALL)
def test_a_tracker_added_to_a_resumed_run_gets_the_earlier_points(name: str, tmp_path: Path) -> None:
    live(tmp_path / "run", [], 0, 5)
    live(tmp_path / "run", [name], 5, 10, resumed_at=5)
    assert READ[name](tmp_path / "run")[0] == expected(10)


@pytest.mark.parametrize(
    ("name", "ending", "end"),
    [
        ("wandb", "error", "1"),
        ("wandb", "interrupted", "255"),
        ("wandb", "", "0"),
        ("swanlab", "error", "RUN_STATE_CRASHED out of memory"),
        ("swanlab", "interrupted", "RUN_STATE_ABORTED KeyboardInterrupt"),
        ("swanlab", "", "RUN_STATE_FINISHED"),
    ],
)
def test_how_a_run_ended_is_told(name: str, ending: str, end: str, tmp_path: Path) -> None:
    live(tmp_path / "run", [name], 0, 2, ending=ending)
    assert READ[name](tmp_path / "run")[2] == [end]


@pytest.mark.parametrize(("name", "hint"), [("wandb", "WANDB_MODE=offline"), ("swanlab", "SWANLAB_MODE=offline")])
def test_nobody_logged_in_is_one_line_at_the_start(name: str, hint: str, tmp_path: Path) -> None:
    online = {"WANDB_MODE": "", "SWANLAB_MODE": ""}
    done = live(tmp_path / "run", [name], 0, 1, ending="refused", env=online)
    (refused,) = [line for line in done.stderr.splitlines() if "REFUSED" in line]
    assert refused.startswith(f"REFUSED --tracker {name}: ") and f"`{name} login`" in refused and hint in refused


def test_the_libraries_own_variables_have_the_last_word(tmp_path: Path) -> None:
    env = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "other", "WANDB_RUN_ID": "mine", "WANDB_DIR": str(tmp_path)}
    live(tmp_path / "run", ["wandb"], 0, 1, env=env)
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-mine.wandb"))) == 1
    env = {"SWANLAB_PROJ_NAME": "theirs", "SWANLAB_RUN_ID": "mine", "SWANLAB_LOG_DIR": str(tmp_path / "logs")}
    live(tmp_path / "run", ["swanlab"], 0, 1, env=env)
    (file,) = tmp_path.glob("logs/run-*/run-mine.swanlab")
    assert any(b"theirs" in record for record in log_records(file))
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": "mine", "swanlab": "mine"}


@pytest.mark.parametrize("variable", ["WANDB_MODE", "SWANLAB_MODE"])
def test_a_library_switched_off_by_its_variable_is_silent(variable: str, tmp_path: Path) -> None:
    name = variable.removesuffix("_MODE").lower()
    live(tmp_path / "run", [name], 0, 2, env={variable: "disabled"})
    live(tmp_path / "run", [name], 2, 4, resumed_at=2, env={variable: "disabled"})
    assert not list((tmp_path / "run").glob("*/*run-*"))


def test_an_unknown_name_and_a_missing_library_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected one of wandb, swanlab, tensorboard, trackio, got 'wanbd'"):
        open_trackers(["wanbd"], RUN, print)
    with pytest.raises(ConfigError, match="each name once"):
        open_trackers(["trackio", "trackio"], RUN, print)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ALL:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()  # as a library's own output folder beside the run, which Python takes for a package
        with pytest.raises(ConfigError, match=rf"--tracker {name}: .* pip install 'minidpo\[{name}\]'"):
            open_trackers([name], RunName(tmp_path, "minicache", "first"), print)


class Breaks(Library):
    """Fails at every call from the given step on, as a library whose disk is full."""

    def __init__(self, name: str = "breaks") -> None:
        super().__init__(name, RUN)
        self.heard: list[int] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        print("noise")
        if step > 1:
            raise OSError("No space left\non device")
        self.heard.append(step)

    def close(self) -> None:
        raise AssertionError("a tracker that failed is left alone")


def test_a_library_that_fails_later_is_noted_once_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    library = Breaks()
    notes: list[str] = []
    with Guarded(library, notes.append) as guarded:
        guarded.start("training", {})
        for step in range(5):
            guarded.log(step, {})
    assert library.heard == [0, 1]
    assert notes == ["breaks: No space left on device; it hears no more of this run, metrics.jsonl has all of it"]
    assert capsys.readouterr() == ("", "noise\n" * 3)


def test_a_start_that_fails_and_damaged_ids_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    (broken,) = open_trackers(["tensorboard"], RunName(tmp_path / "file", "minicache", "first"), print)
    notes: list[str] = []
    never_started = Guarded(Breaks(), notes.append)
    with (
        pytest.raises(ConfigError, match=r"^--tracker tensorboard: .*file"),
        TrackerGroup(broken, never_started) as both,
    ):
        both.start("training", {})
    assert notes == []
    (tmp_path / "trackers.json").write_text('{"trackio": ')
    done = live(tmp_path, ["trackio"], 5, 6, resumed_at=5, ending="refused")
    assert "trackers.json: cannot be read" in done.stderr and "remove it" in done.stderr


# --- a new tracker is a class and a line ---


class Csv(Library):
    """A tracker that some version to come might add."""

    package = "csv"
    help = "CSV files"
    advice = "make room for numbers.csv"

    def start(self, title: str, facts: dict[str, Any]) -> None:
        if "bad" in facts:
            raise OSError("no room")
        self.remember_id("1")
        self.catch_up(0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        raise OSError("no more room")


def test_a_new_tracker_is_named_in_every_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "table", Csv)
    run = RunName(tmp_path, "minicache", "first")
    notes: list[str] = []
    with pytest.raises(ConfigError, match="expected one of wandb, swanlab, tensorboard, trackio, table, got 'csv'"):
        open_trackers(["csv"], run, print)
    (tracker,) = open_trackers(["table"], run, notes.append)
    with pytest.raises(ConfigError, match=r"^--tracker table: no room; make room for numbers\.csv$"):
        tracker.start("training", {"bad": 1})
    tracker.start("training", {})
    tracker.log(0, {"loss": 1.0})
    tracker.close()
    assert notes == ["table: no more room; it hears no more of this run, metrics.jsonl has all of it"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"table": "1"}


@pytest.mark.parametrize(
    ("extra", "said"), [(None, "pip install no_such_csv"), ("csv", r"pip install 'minidpo\[csv\]'")]
)
def test_a_new_tracker_that_is_not_installed_says_how(
    extra: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "table", type("Missing", (Csv,), {"package": "no_such_csv", "extra": extra}))
    with pytest.raises(ConfigError, match=f"^--tracker table: the library is not installed; {said}$"):
        open_trackers(["table"], RunName(tmp_path, "minicache", "first"), print)


@pytest.mark.parametrize("name", TRACKERS)
def test_the_guide_and_the_package_know_every_tracker(name: str) -> None:
    kind, root = TRACKERS[name], Path(__file__).parents[2]
    guide = (root / "docs" / "trackers.md").read_text(encoding="utf-8")
    assert f"## {kind.help}\n" in guide and f"--tracker {name}" in guide
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if kind.extra:
        assert f"minidpo[{kind.extra}]" in guide
        assert any(wanted.startswith(kind.package) for wanted in extras[kind.extra])


def test_an_id_that_was_half_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Wandb("wandb", RunName(tmp_path, "minicache", "first", resumed_at=3))
    library.remember_id("one")

    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=r"trackers\.json: the disk is full"):
            library.remember_id("two")
    assert library.known_id() == "one" and len(list(tmp_path.iterdir())) == 1


def test_metrics_go_on_behind_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(8))
    file.write_text(whole + '{"step": 8, "lo')
    lines = JsonLines(file, resumed_at=6)
    lines.log(6, {"loss": 0.5})
    lines.close()
    kept = file.read_text().splitlines()
    assert kept[:6] == whole.splitlines()[:6] and json.loads(kept[6]) == {"step": 6, "loss": 0.5} and len(kept) == 7
    JsonLines(file).close()
    assert file.read_text() == ""


def test_an_error_reaches_every_tracker_before_it_is_closed() -> None:
    class Hears(Silent):
        def __init__(self) -> None:
            self.heard: list[object] = []

        def fail(self, error: BaseException) -> None:
            self.heard.append(error)

        def close(self) -> None:
            self.heard.append("closed")

    one, two, error = Hears(), Hears(), RuntimeError("out of memory")
    with pytest.raises(RuntimeError), TrackerGroup(one, two):
        raise error
    assert one.heard == two.heard == [error, "closed"]
    with TrackerGroup(one):
        pass
    assert one.heard == [error, "closed", "closed"]
