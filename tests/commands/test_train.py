"""`minidpo train`: what a run directory may not decide."""

import json
from pathlib import Path

from minicache.commands.train import facts_to_resume
from tests.conftest import Cli


def test_a_run_directory_cannot_allow_a_models_code_to_run(tmp_path: Path) -> None:
    """It may be a stranger's; only the command line can."""
    (tmp_path / "run.json").write_text(json.dumps({"lr": 0.5, "trust_remote_code": True}))
    assert facts_to_resume({"out": tmp_path, "resume": True}) == {"lr": 0.5}


def test_an_adapter_that_no_memory_holds_is_one_line(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("train", "--ref-cache", ref_cache, "--out", tmp_path / "run", "--lora-rank", 10**11)
    assert code == 1 and "out of memory" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()
