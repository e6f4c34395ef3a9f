"""Policies and caches are sent to a Hub on loopback by the real library, and read back from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from minicache.cache.places.hub import snapshot_at
from minicache.cache.reader import ReferenceCache
from minicache.errors import OutputError
from minicache.exchange.parcels import machine_paths, model_files
from minicache.models.adapter_places import MERGED_BASE
from minicache.options.lora import LoraOptions
from minicache.options.train import TrainConfig, ValidationOptions
from minicache.pages.card import is_unchanged
from minicache.reports.public import hub_id, public_name, public_value
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.hub_repos import Hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ref_cache: Path) -> Path:
    """A run with held-out pairs and checkpoints."""
    return train_into(tmp_path_factory.mktemp("runs") / "run", ref_cache)


def train_into(out: Path, cache: Path, **options: Any) -> Path:
    config = TrainConfig(
        ref_cache=cache,
        out=out,
        batch_size=8,
        max_steps=4,
        save_every=2,
        validation=ValidationOptions(holdout=0.2, eval_every=2),
        **{"lr": 0.05, "beta": 0.1, **options},
    )
    train(config, one_process(), Silent())
    return out


def refused(cli: Cli, *arguments: object) -> str:
    code, _, stderr = cli("push", *arguments)
    assert code == 1, stderr
    (line,) = [line for line in stderr.splitlines() if "error:" in line]
    return line


def front_of(card: str) -> dict[str, Any]:
    front = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(front, dict)
    return front


def everything(hub: Hub) -> bytes:
    """All that lies on the hub."""
    return b"".join(b for repo in hub.repos.values() for _, files in repo.commits for b in files.values())


def test_a_cache_there_and_back(repos: Hub, ref_cache: Path, cli: Cli) -> None:
    code, stdout, stderr = cli("push", ref_cache, "org/name")
    assert code == 0, stderr
    sent = repos.dataset()
    assert sent.private and len(sent.commits) == 2 and sent.commits[-1][0][:12] in stdout
    assert "can read the text of all 40 pairs" in " ".join(stderr.split())
    cache, here = ReferenceCache("hf://datasets/org/name"), ReferenceCache(ref_cache)
    assert cache.identity == here.identity and list(cache.verify()) == []
    assert cache.log.model == Path(here.log.model).name and cache.log.sources[0].name == "pairs.jsonl"
    # nothing of this machine, no list of refused rows, no lock
    assert str(ref_cache.parents[1]).encode() not in everything(repos)
    assert not {name for name in sent.files if name.startswith("refused") or "claim" in name}
    card = sent.files["README.md"].decode()
    front = front_of(card)
    assert front["viewer"] is False and "license" not in front and front["size_categories"] == ["n<1K"]
    for said in (here.identity.digest, here.identity.weights, "pairs.jsonl", "--ref-cache hf://datasets/org/name"):
        assert said in card, said


def test_a_second_push_sends_what_is_new_and_deletes_what_is_gone(
    repos: Hub, ref_cache: Path, tmp_path: Path, cli: Cli, model_dir: Path
) -> None:
    assert cli("push", ref_cache, "org/name")[0] == 0
    before = repos.dataset().files
    stored = set(repos.lfs)
    assert cli("push", ref_cache, "org/name")[0] == 0
    assert len(repos.dataset().commits) == 2 and set(repos.lfs) == stored
    # a smaller cache takes its place
    small = precompute_into(tmp_path / "small", model_dir, write_jsonl(tmp_path / "few.jsonl", make_rows(9)))
    repos.dataset().commit({**before, "notes.md": b"mine"})
    assert cli("push", small, "org/name")[0] == 0
    assert "pairs/lengths/c/4/0/0" in before and "pairs/lengths/c/4/0/0" not in repos.dataset().files
    assert repos.dataset().files["notes.md"] == b"mine"
    snapshot_at.cache_clear()
    assert list(ReferenceCache("hf://datasets/org/name").verify()) == []


def test_many_files_go_in_parts_and_the_root_is_last(
    repos: Hub, ref_cache: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("push", ref_cache, "org/name")[0] == 0
    monkeypatch.setattr("minicache.exchange.hub.MOST_FILES", 20)
    repos.dataset().commit({"zarr.json": b"{}", "pairs/tokens/zarr.json": b"{}"})
    begun = len(repos.dataset().commits)
    assert cli("push", ref_cache, "org/name", "--replace-card")[0] == 0
    parts = [files for _, files in repos.dataset().commits[begun:]]
    assert len(parts) > 2 and ["zarr.json" in files for files in parts] == [False] * (len(parts) - 1) + [True]
    snapshot_at.cache_clear()
    assert list(ReferenceCache("hf://datasets/org/name").verify()) == []


def test_a_models_file_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(OutputError, match=r"config.json: cannot be read as JSON: maximum recursion depth"):
        model_files(tmp_path, None)


def test_a_policy_loads_by_its_name(repos: Hub, trained: Path, cli: Cli) -> None:
    code, _, stderr = cli(
        "push", trained, "org/name", "--kind", "policy", "--license", "mit", "--base-model", "org/base"
    )
    assert code == 0, stderr
    files = repos.model().files
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "curves.png", "metrics.jsonl"} <= set(
        files
    )
    assert not {name for name in files if "checkpoint" in name or "optimizer" in name or name == "run.json"}
    assert str(trained.parents[1]).encode() not in everything(repos)
    card = files["README.md"].decode()
    front = front_of(card)
    assert front["base_model"] == "org/base" and front["license"] == "mit" and front["library_name"] == "transformers"
    for said in (
        "--lr",
        "`0.05`",
        "reward accuracy",
        "(before)",
        "(95%: ",
        "(curves.png)",
        "pairs.jsonl",
        "held out",
        "[org/base]",
    ):
        assert said in card, said
    program = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "T.from_pretrained('org/name'); print(M.from_pretrained('org/name').config.vocab_size)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "400", done.stderr


def test_an_adapter_names_its_base_as_others_know_it(
    repos: Hub, ref_cache: Path, trained: Path, tmp_path: Path, cli: Cli
) -> None:
    run = train_into(tmp_path / "run", ref_cache, lora=LoraOptions(lora_rank=2))
    code, _, stderr = cli("push", run, "org/name")
    assert code == 0 and "--base-model org/name names it" in " ".join(stderr.split())
    files = repos.model().files
    assert (
        json.loads(files["adapter_config.json"])["base_model_name_or_path"]
        == Path(ReferenceCache(ref_cache).log.model).name
    )
    assert front_of(files["README.md"].decode())["library_name"] == "peft"
    assert cli("push", run, "org/name", "--base-model", "org/base")[0] == 0
    files = repos.model().files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    front = front_of(files["README.md"].decode())
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "adapter"
    assert str(tmp_path).encode() not in everything(repos)
    # an adapter on a base that only this run has cannot be used by others
    (run / MERGED_BASE).mkdir()
    assert f"export --policy {run} --out MERGED" in refused(cli, run, "org/name")
    # a whole model takes the adapter's place
    assert cli("export", "--policy", run, "--out", tmp_path / "merged", "--device", "cpu")[0] == 0
    assert cli("push", run, "org/name", "--model", tmp_path / "merged")[0] == 0
    assert "config.json" in repos.model().files and not {n for n in repos.model().files if n.startswith("adapter_")}


def test_a_policy_that_did_not_move_says_so(repos: Hub, ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    run = train_into(tmp_path / "run", ref_cache, lr=1e-12)
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    code, stdout, stderr = cli("push", run, "org/name")
    assert code == 0 and outcome["model_step"] == 0
    _, exported, _ = cli("export", "--policy", run, "--out", tmp_path / "exported", "--device", "cpu")
    assert "✓" not in stdout and "– " in stdout and "✓" not in exported and "– " in exported
    assert "no step was better than the start" in " ".join(stderr.split())
    card = repos.model().files["README.md"].decode()
    assert "the weights here are those of the model that training started from" in card
    assert "step 0 (before, and saved)" in card


@pytest.mark.parametrize("public", [False, True])
def test_who_may_read_is_said_and_asked_for(repos: Hub, ref_cache: Path, cli: Cli, public: bool) -> None:
    code, _, stderr = cli("push", ref_cache, "org/name", *(["--public"] if public else []))
    said = "is made public; everybody can read" if public else "is made private; you and those who may see it can read"
    assert code == 0 and said in " ".join(stderr.split())
    assert repos.dataset().private is not public
    asked = len(repos.written)
    line = refused(cli, ref_cache, "org/name", *([] if public else ["--public"]))
    assert ("there already and public; expected --public" if public else "there already and private") in line
    assert len(repos.written) == asked


def test_a_card_that_a_person_changed_stays(repos: Hub, ref_cache: Path, cli: Cli) -> None:
    assert cli("push", ref_cache, "org/name")[0] == 0
    ours = repos.dataset().files["README.md"].decode()
    assert is_unchanged(ours) and is_unchanged(ours.replace("\n", "\r\n")) and not is_unchanged("# mine\n")
    mine = ours.replace("## How to read it", "## How I read it").encode()
    repos.dataset().commit({**repos.dataset().files, "README.md": mine})
    code, _, stderr = cli("push", ref_cache, "org/name")
    assert code == 0 and "was changed by a person and stays" in " ".join(stderr.split())
    assert repos.dataset().files["README.md"] == mine
    assert cli("push", ref_cache, "org/name", "--replace-card")[0] == 0
    assert repos.dataset().files["README.md"].decode() == ours


def test_a_dry_run_asks_nothing(
    repos: Hub, ref_cache: Path, trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for source in (ref_cache, trained):
        code, stdout, stderr = cli("push", source, "org/name", "--dry-run")
        assert code == 0 and "would be sent to" in stdout and "# name" in stdout and "README.md" in stdout, stderr
        code, stdout, _ = cli("push", source, "org/name", "--dry-run", "--json")
        assert json.loads(stdout)["commit"] is None
    assert repos.asked == []


def test_other_things_are_refused_by_name(repos: Hub, ref_cache: Path, trained: Path, tmp_path: Path, cli: Cli) -> None:
    cases: list[tuple[list[object], str]] = [
        ([ref_cache, "org/name", "--kind", "policy"], "--kind policy: "),
        ([trained, "org/name", "--kind", "cache"], "is a policy"),
        ([trained / "model", "org/name"], f"name the run, {trained}"),
        ([tmp_path, "org/name"], "neither a run (no run.json in it) nor a reference cache (no zarr.json)"),
        ([tmp_path / "none", "org/name"], "no such directory"),
        (["hf://datasets/org/other", "org/name"], "copy what lies at a URL first"),
        ([ref_cache, "name"], "org/name, got 'name'"),
        ([ref_cache, "org/name", "--license", "My Own"], "a name of the Hub's list"),
        ([ref_cache, "org/name", "--base-model", "/a/b"], "--base-model: expected"),
        ([ref_cache, "org/name", "--model", tmp_path], "--model: is for a policy"),
        ([trained, "org/name", "--model", tmp_path], "holds no model"),
    ]
    for arguments, said in cases:
        assert said in refused(cli, *arguments), arguments
    assert repos.written == []


def test_what_is_not_whole_is_not_sent(repos: Hub, ref_cache: Path, trained: Path, tmp_path: Path, cli: Cli) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(ref_cache, cache)
    shutil.copytree(trained, run)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({name: value for name, value in facts.items() if name != "outcome"}))
    assert "this run is not finished" in refused(cli, run, "org/name")
    (cache / "ref/logp_mean/c/2/0/0").unlink()
    assert "ref/logp_mean, block 2" in refused(cli, cache, "org/name")
    shutil.copy(ref_cache / "ref/logp_mean/c/2/0/0", cache / "ref/logp_mean/c/2/0/0")
    (cache / "pairs/tokens/c/9").mkdir()
    (cache / "pairs/tokens/c/9/0").symlink_to(tmp_path / "run/run.json")
    assert "expected a file, got a link" in refused(cli, cache, "org/name")
    assert repos.written == []


def test_a_hub_that_refuses_is_one_line(repos: Hub, ref_cache: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the token may not do this" in refused(cli, ref_cache, "others/name")
    assert "refuses the card's front matter; check --license" in refused(
        cli, ref_cache, "org/name", "--license", "unheard-of"
    )
    repos.refuse = {"/commit/": 500}
    assert "refuses (500)" in refused(cli, ref_cache, "org/name")
    repos.refuse = {}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "does not know the token" in refused(cli, ref_cache, "org/another")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(cli, ref_cache, "org/name")
    monkeypatch.delenv("HF_TOKEN")
    assert "writing to the Hub needs a token" in refused(cli, ref_cache, "org/name")


def test_an_interrupted_push_leaves_no_commit_and_goes_on(repos: Hub, ref_cache: Path, cli: Cli) -> None:
    repos.slow = Event()
    command = [sys.executable, "-m", "minicache", "push", str(ref_cache), "org/name"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "0"})
    assert repos.uploading.wait(60)
    process.send_signal(signal.SIGINT)
    repos.slow.set()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; " in stderr and "Traceback" not in stderr, stderr
    assert len(repos.dataset().commits) == 1
    assert cli("push", ref_cache, "org/name")[0] == 0
    assert list(ReferenceCache("hf://datasets/org/name").verify()) == []


def test_only_the_last_part_of_a_path_is_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    commit = "a" * 40
    for name, public in {
        "/home/me/models/mine": "mine",
        "models/mine": "mine",
        "org/name": "org/name",
        r"C:\models\mine\\": "mine",
        "/home/me/full.pth:heads=8": "full.pth:heads=8",
        "s3://bucket/secret/cache:0.7": "cache:0.7",
        f"hf://datasets/org/name@{commit}": f"hf://datasets/org/name@{commit}",
        f"org/name@{commit}:data/train.parquet": f"org/name@{commit}:data/train.parquet",
    }.items():
        assert public_name(name) == public, name
    assert hub_id("models/mine") is None and hub_id("org/name") == "org/name"
    assert public_value(["/a/b", 3, "cosine", Path("/c/d")]) == ["b", 3, "cosine", "d"]


def test_a_text_that_names_this_machine_is_told(tmp_path: Path) -> None:
    source = tmp_path / "cache"
    files: dict[str, Path | bytes] = {
        "a.json": json.dumps({"at": f"{Path.home()}/models"}).encode(),
        "b.json": json.dumps({"at": str(source)}).encode(),
        "c.json": b'{"at": "org/name"}',
        "d.safetensors": f"{source}/x".encode(),
    }
    assert machine_paths(files, source) == ["a.json", "b.json"]


def test_parts_are_bounded_by_files_and_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import CommitOperationAdd

    from minicache.exchange import hub

    monkeypatch.setattr(hub, "MOST_FILES", 4)
    monkeypatch.setattr(hub, "MOST_BYTES", 100)
    monkeypatch.setattr(hub, "LARGE", 90)
    adds = [CommitOperationAdd(f"{n}", b"x" * size) for n, size in enumerate([60, 60, 500, 40, 1, 1, 1, 1, 1])]
    assert [[int(add.path_in_repo) for add in part] for part in hub._parts(adds)] == [[0], [1, 2, 3], [4, 5, 6, 7], [8]]
