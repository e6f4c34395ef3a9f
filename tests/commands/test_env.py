"""`minidpo env` and `--verbose`."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minicache.reports.environment import look_around

Cli = Callable[..., tuple[int, str, str]]


def test_the_environment_names_what_a_report_needs(cli: Cli) -> None:
    code, shown, _ = cli("env")
    assert code == 0 and {"minidpo", "python", "gpu", "torch", "zarr"} <= {
        line.split()[0] for line in shown.splitlines()
    }
    found = json.loads(cli("env", "--json")[1])
    assert found["packages"]["torch"] and found["minidpo"] == "0.1.0" and "bitsandbytes" in found["extras"]["8bit"]


def test_a_missing_package_is_missing_and_a_broken_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = look_around()
    assert found.problem and "torch" in found.problem and found.devices == []


def test_no_variable_that_may_hold_a_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    shown = str(look_around())
    assert "secret" not in shown and look_around().variables["OMP_NUM_THREADS"] == "3"


def test_verbose_shows_the_traceback_behind_the_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minicache", "inspect-cache", str(tmp_path / "absent")]
    quiet, loud = (subprocess.run([*command, *more], capture_output=True, text=True) for more in ([], ["--verbose"]))
    assert quiet.returncode == loud.returncode == 1
    assert "Traceback" not in quiet.stderr and "CacheNotFound" in loud.stderr
    assert quiet.stderr.splitlines()[-1] == loud.stderr.splitlines()[-1]


def test_verbose_logs_what_a_stage_does(
    cli: Cli, ref_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "minicache"):
        assert cli("train", "--ref-cache", ref_cache, "--out", tmp_path / "run", "--max-steps", 1)[0] == 0
    said = {record.name.split(".")[1] for record in caplog.records}
    assert {"models", "cache", "scoring", "training"} <= said
