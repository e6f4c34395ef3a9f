"""All commands as on Windows, and in terminals whose encoding lacks some characters. What cannot be had on Linux is taken away."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minicache
from tests.conftest import make_rows, write_jsonl
from tests.helpers.stores import assert_same_store


def run(place: Path, commands: list[list[object]], *kind: str, encoding: str = "utf-8") -> tuple[str, str]:
    """What the commands print to stdout and stderr. All of them succeed."""
    file = place / "commands.json"
    file.write_text(json.dumps([[str(each) for each in command] for command in commands]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.elsewhere", str(file), *kind],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"},
    )
    stdout, stderr = (text.decode(encoding) for text in (done.stdout, done.stderr))
    codes = [line for line in stderr.splitlines() if line.startswith("exit code ")]
    assert codes == [f"exit code 0: {command[0]}" for command in commands], stderr
    assert done.returncode == 0 and "Traceback" not in stderr, stderr
    return stdout, stderr


def story(place: Path, model: Path, data: Path) -> list[list[object]]:
    """Every command, in a folder with spaces and Chinese characters; the data has a word of Greek and one of Tibetan."""
    cache, out, sweep = place / "缓存", place / "run 1", place / "sweep"
    more = write_jsonl(place / "更多.jsonl", [*make_rows(3, seed=5), *make_rows(2, seed=6)])
    stage_one: list[object] = ["precompute-ref", "--model", model, "--ref-cache", cache, "--block-pairs", 8]
    train: list[object] = ["train", "--ref-cache", cache, "--out", out, "--batch-size", 8, "--save-every", 1]
    pair: list[object] = ["--prompt", "你好 γειά བཀྲ", "--max-new-tokens", 3]
    two: list[object] = ["--loss", "sigmoid:0.8,hinge:0.2", "--beta", "0.1,0.2", "--max-steps", 2, "--holdout", 0.2]
    compare: list[object] = ["compare", "--policy", out, "--html", place / "votes.html", *pair]
    return [
        [*stage_one, "--data", data],
        [*stage_one, "--data", data, more],
        ["inspect-cache", cache, "--html", place / "page.html", "--plot", place / "plot.png"],
        ["inspect-cache", cache, "--pair", 0],
        ["inspect-cache", cache, "--verify", "--model", model],
        [*train, "--max-steps", 3, "--holdout", 0.2],
        ["train", "--resume", "--out", out],
        ["sweep", "--ref-cache", cache, "--out", sweep, *two],
        ["evaluate", "--policy", out, "--ref-cache", cache],
        compare,
        ["compare", "--policy", out, "--json", *pair],
        ["export", "--policy", out, "--out", place / "policy"],
        ["export", "--ref-cache", cache, "--out", place / "table.jsonl"],
        ["import-cache", place / "table.jsonl", "--ref-cache", place / "imported", "--model", model],
        ["diff", cache, place / "imported"],
        ["report", out],
        ["plot", out],
        ["fit", "--model", model, "--memory", "1GB"],
        ["env"],
    ]


def test_every_command_runs_where_windows_lacks_what_linux_has(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """And leaves nothing behind that it could not remove."""
    stdout, _ = run(tmp_path, story(tmp_path, model_dir, data_file), "windows")
    assert "✓" in stdout and "reproduces the sample" in stdout
    left = [file for file in tmp_path.rglob("*") if file.name.endswith((".draft", ".partial", ".lock", ".claim"))]
    assert not left
    steps = sorted(file.name for file in (tmp_path / "run 1/checkpoints").iterdir())
    assert len(steps) <= 2 and "step-000002" in steps, "the newest and the best"
    names = [file.name for file in tmp_path.rglob("*")]
    assert not [name for name in names if set(name) & set('<>:"|?*\\') or name.endswith((".", " "))]


@pytest.mark.slow
def test_a_cache_is_the_same_there(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    for kind in ("here", "windows"):
        (tmp_path / kind).mkdir()
        cache = tmp_path / kind / "cache"
        run(tmp_path, [["precompute-ref", "--model", model_dir, "--data", data_file, "--ref-cache", cache]], kind)
    assert_same_store(tmp_path / "here/cache", tmp_path / "windows/cache")


@pytest.mark.slow
def test_every_command_prints_in_gbk(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """As in a pipe on a Chinese Windows; GBK has neither the check mark nor Tibetan."""
    stdout, _ = run(tmp_path, story(tmp_path, model_dir, data_file), encoding="gbk")
    assert "+ the model reproduces the sample" in stdout and "缓存" in stdout
    found = json.JSONDecoder().raw_decode(stdout[stdout.index('[\n  {\n    "prompt"') :])[0]
    assert found[0]["prompt"] == "你好 γειά བཀྲ", "--json loses nothing"


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_errors_and_help_print_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "minicache"]
    for arguments, code, said in (
        (["inspect-cache", str(tmp_path / "འདི་ 没有")], 1, "no such directory"),
        (["train", "--help"], 0, "--ref-cache"),
        (["--help"], 0, "precompute-ref"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, env=environment)
        text = (done.stdout + done.stderr).decode(encoding)
        assert done.returncode == code and said in text and "Traceback" not in text


def opened_as_text(node: ast.AST) -> bool:
    """Whether a call opens a text file: `open`, `read_text`, `write_text`, `fdopen`, without "b" in its mode."""
    if not isinstance(node, ast.Call):
        return False
    of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    is_file = name in ("open", "fdopen") and of != "os" and any(set(mode) <= set("rwax+t") for mode in modes)
    return is_file or name in ("read_text", "write_text")


PACKAGE = Path(minicache.__file__).parent


def test_text_files_are_utf_8_and_their_lines_end_alike_everywhere() -> None:
    """Windows would read and write them in GBK or the like, and end lines with a return."""
    for file in PACKAGE.rglob("*.py"):
        for node in filter(opened_as_text, ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
            assert isinstance(node, ast.Call)
            given = {each.arg for each in node.keywords}
            modes = {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
            writes = "write_text" in ast.unparse(node.func) or modes & {"w", "a", "x"}
            assert given >= ({"encoding", "newline"} if writes else {"encoding"}), f"{file}:{node.lineno}"


def test_that_test_sees_what_it_looks_for() -> None:
    calls = "a.read_text(); a.write_text(b); a.open('a'); open(b, 'w'); a.open('rb'); open(b, 'wb'); os.open(c, 'w')"
    found = [ast.unparse(node) for node in ast.walk(ast.parse(calls)) if opened_as_text(node)]
    assert found == ["a.read_text()", "a.write_text(b)", "a.open('a')", "open(b, 'w')"]
