"""The command line as a person meets it: one red line for each thing that can be wrong, exit codes, JSON."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minicache.cli import expand_data
from tests.conftest import Cli, make_rows, write_jsonl


def one_line(stderr: str) -> str:
    """The error, and nothing like a traceback."""
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    return line


def test_several_files_follow_one_data_option() -> None:
    assert expand_data(["x", "--data", "a", "b", "c", "--model", "m"]) == [
        "x", "--data", "a", "--data", "b", "--data", "c", "--model", "m",
    ]  # fmt: skip
    assert expand_data(["--data", "a", "--data", "b"]) == ["--data", "a", "--data", "b"]
    assert expand_data(["--data=a", "b"]) == ["--data=a", "b"]


def test_the_whole_story(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    """A path with spaces and Chinese characters, two files, and the four commands."""
    place = tmp_path / "我的 data"
    place.mkdir()
    files = [write_jsonl(place / f"{seed}.jsonl", make_rows(6, seed=seed)) for seed in (1, 2)]
    cache, run = place / "缓存", place / "run 1"
    code, stdout, _ = cli("precompute-ref", "--model", model_dir, "--data", *files, "--ref-cache", cache)
    assert code == 0 and "12 pairs" in stdout and "12 scored now" in stdout
    code, stdout, _ = cli("inspect-cache", cache)
    assert code == 0 and "complete" in stdout and "12, scored 12" in stdout
    code, stdout, stderr = cli("train", "--ref-cache", cache, "--out", run, "--batch-size", 4, "--lr", "1e-3")
    assert code == 0 and "step 0" in stdout and "handshake" in stderr
    code, stdout, _ = cli("evaluate", "--policy", run, "--ref-cache", cache, "--json")
    assert code == 0 and json.loads(stdout)["pairs"] == 12
    code, stdout, _ = cli("compare", "--policy", run, "--prompt", "why not", "--max-new-tokens", 4, "--json")
    assert code == 0 and json.loads(stdout)[0]["prompt"] == "why not"


def test_evaluate_takes_the_settings_of_the_run(cli: Cli, ref_cache: Path, tmp_path: Path) -> None:
    options = ("--beta", "0.7", "--logps", "sum", "--loss", "hinge", "--sft-weight", "0.25", "--max-steps", "1")
    assert cli("train", "--ref-cache", ref_cache, "--out", tmp_path / "run", *options)[0] == 0
    _, stdout, _ = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", ref_cache, "--json")
    settings = json.loads(stdout)["settings"]
    assert (settings["loss"], settings["logps"], settings["beta"]) == ("hinge", "sum", 0.7)
    assert settings["sft_weight"] == 0.25
    _, stdout, _ = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", ref_cache, "--beta", "0.2", "--json")
    assert json.loads(stdout)["settings"]["beta"] == 0.2


def test_an_inspection_is_stable_json(cli: Cli, ref_cache: Path) -> None:
    code, stdout, _ = cli("inspect-cache", ref_cache, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["pairs"] == 40 and found["complete"] and found["identity"]["family"] == "llama"
    code, stdout, _ = cli("inspect-cache", ref_cache, "--pair", 3, "--json")
    assert code == 0 and json.loads(stdout)["line"]["index"] == 3


def test_verify_passes_and_fails_by_exit_code(cli: Cli, ref_cache: Path, model_dir: Path, tmp_path: Path) -> None:
    code, stdout, _ = cli("inspect-cache", ref_cache, "--verify", "--model", model_dir)
    assert code == 0 and "as written" in stdout and "reproduces" in stdout
    cache = shutil.copytree(ref_cache, tmp_path / "cache")
    (cache / "ref" / "logp_mean" / "c" / "1" / "0" / "0").unlink()
    code, stdout, _ = cli("inspect-cache", cache, "--verify")
    assert code == 1 and "ref/logp_mean, block 1" in " ".join(stdout.split())
    code, stdout, _ = cli("inspect-cache", cache, "--verify", "--json")
    assert code == 1 and len(json.loads(stdout)["problems"]) == 1


WRONG = {
    "no such data": (["precompute-ref", "--model", "MODEL", "--data", "absent.jsonl", "--ref-cache", "NEW"], "no such file"),
    "no such model": (["precompute-ref", "--model", "./absent", "--data", "DATA", "--ref-cache", "NEW"], "model directory"),
    "no such name": (["precompute-ref", "--model", "absent", "--data", "DATA", "--ref-cache", "NEW"], "no such directory"),
    "no such cache": (["train", "--ref-cache", "absent", "--out", "NEW"], "precompute-ref"),
    "no cache there": (["train", "--ref-cache", "MODEL", "--out", "NEW"], "no reference cache"),
    "unknown loss": (["train", "--ref-cache", "CACHE", "--out", "NEW", "--loss", "dpo"], "sigmoid"),
    "unknown format": (["precompute-ref", "--model", "MODEL", "--data", "DATA", "--ref-cache", "NEW", "--format", "x"], "sharegpt"),
    "beta of 0": (["train", "--ref-cache", "CACHE", "--out", "NEW", "--beta", "0"], "--beta: expected a number above 0"),
    "warmup of 3.5": (["train", "--ref-cache", "CACHE", "--out", "NEW", "--warmup", "3.5"], "--warmup: expected a share"),
    "no pair 99": (["inspect-cache", "CACHE", "--pair", "99"], "the cache holds 40"),
    "model without verify": (["inspect-cache", "CACHE", "--model", "MODEL"], "--verify"),
    "nothing to compare": (["compare", "--policy", "MODEL"], "--prompt TEXT"),
    "no reference known": (["compare", "--policy", "MODEL", "--prompt", "x"], "--reference MODEL"),
    "out is a file": (["train", "--ref-cache", "CACHE", "--out", "DATA"], "exists already"),
    "no template file": (
        ["precompute-ref", "--model", "MODEL", "--data", "DATA", "--ref-cache", "NEW", "--chat-template", "absent"],
        "--chat-template absent",
    ),
    "nothing to resume": (["train", "--out", "NEW", "--resume"], "new: no run to resume"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(
    cli: Cli, case: str, ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    arguments, message = WRONG[case]
    places = {"CACHE": ref_cache, "MODEL": model_dir, "DATA": data_file, "NEW": tmp_path / "new"}
    code, _, stderr = cli(*(places.get(argument, argument) for argument in arguments))
    assert code == 1 and message in one_line(stderr)
    assert not (tmp_path / "new").exists() and not list(tmp_path.iterdir())


def test_an_exported_directory_is_open_to_whom_the_umask_lets_in(cli: Cli, model_dir: Path, tmp_path: Path) -> None:
    (usual := tmp_path / "usual").mkdir()
    assert cli("export", "--policy", model_dir, "--out", tmp_path / "policy")[0] == 0
    assert (tmp_path / "policy").stat().st_mode == usual.stat().st_mode


def test_wrong_usage_is_exit_code_2(cli: Cli) -> None:
    assert cli("train")[0] == 2
    assert cli("train", "--no-such-option")[0] == 2
    assert cli("train", "--out", "absent")[0] == 2


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version")[1].strip() == "0.1.0"
    for command in ("precompute-ref", "train", "inspect-cache", "evaluate", "compare"):
        code, stdout, _ = cli(command, "--help")
        assert code == 0 and "--" in stdout


def test_python_m_minicache_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "minicache", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0")


def test_the_command_line_starts_without_what_only_stages_need() -> None:
    heavy = ("torch", "numpy", "zarr", "transformers", "huggingface_hub", "matplotlib", "jinja2", "yaml", "pyarrow")
    code = f"import sys, minicache.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
