"""The judge beside a real server, that of transformers; left out where the packages that serve are not installed (extra dev)."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.conftest import Cli

PACKAGES = ("fastapi", "uvicorn", "openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f"needs {', '.join(PACKAGES)} to serve a model"),
]


@pytest.fixture
def served(model_dir: Path, tmp_path: Path) -> Iterator[str]:
    """The base URL of a server of this model."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model_dir), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    try:
        base, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + 200
        while process.poll() is None and time.monotonic() < end:
            try:
                urlopen(f"{base}/models", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail((tmp_path / "log").read_text(errors="replace")[-2000:])
        yield base
    finally:
        process.terminate()
        process.wait()


def test_the_command_against_transformers_serve(
    cli: Cli, served: str, model_dir: Path, ref_cache: Path, tmp_path: Path
) -> None:
    """A random model says nothing that can be read, and every request comes through."""
    verdicts = tmp_path / "v.jsonl"
    asked = ("compare", "--policy", model_dir, "--reference", model_dir, "--prompt", "why not", "--max-new-tokens", 4)
    judge = ("--judge", served, "--judge-model", model_dir, "--verdicts", verdicts)
    code, stdout, stderr = cli(*asked, *judge, "--json")
    assert code == 0 and json.loads(stdout)["judge"]["same_answers"] == 1, stderr
    sampled = ("--temperature", 1.5, "--seed", 3, "--prompt", "the cat", "--prompt", "a mat")
    code, stdout, stderr = cli(*asked, *sampled, *judge, "--reference", _other(model_dir, tmp_path), "--json")
    assert code == 0, stderr
    found, lines = json.loads(stdout)["judge"], verdicts.read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line) for line in lines]
    # both orders of three prompts
    assert len(replies) == 6 and all(each["reply"].strip() for each in replies)
    assert all(each["read"] > 100 and 0 < each["written"] <= each["max_tokens"] for each in replies)
    for name in ("read", "written"):
        assert found[name] == sum(each[name] for each in replies)
    assert found["verdicts"] == sum(each["verdict"] is not None for each in replies)
    assert found["judged"] + found["unreadable"] == len(found["prompts"]) == 3
    code, _, stderr = cli(*asked, "--reference", _other(model_dir, tmp_path), *judge[:3], "no-model", *judge[4:])
    assert code == 1 and "has no model 'no-model'" in " ".join(stderr.split())


def _other(model_dir: Path, tmp_path: Path) -> Path:
    """Another model with the same tokenizer."""
    import shutil
    import warnings

    from tests.conftest import tiny_llama

    place = tmp_path / "other"
    if not place.exists():
        shutil.copytree(model_dir, place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny_llama(seed=1).save_pretrained(place)
    return place
