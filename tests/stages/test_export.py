"""From a checkpoint through both stages and back: MiniMind's own keys, Hugging Face directories, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minicache.models import load_model
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl
from tests.references.checkpoints import NAMES


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ref_cache: Path) -> Path:
    """A run of a Hugging Face model, with checkpoints."""
    out = tmp_path_factory.mktemp("export") / "run"
    config = TrainConfig(ref_cache, out, batch_size=8, max_steps=4, lr=1e-3, save_every=2, keep_last=2)
    train(config, one_process(), Silent())
    return out


def refused(cli: Cli, *arguments: object) -> str:
    """The one line of an export that is refused."""
    code, _, stderr = cli("export", *arguments)
    assert code == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_a_minimind_file_through_both_stages_and_back(
    checkpoints: Path, tokenizer_dir: Path, tmp_path: Path, cli: Cli, name: str, dtype: str
) -> None:
    file, cache, run, back = (
        checkpoints / f"{name}.pth",
        *(tmp_path / part for part in ("cache", "run", "back.pth")),
    )
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(6))
    precompute_into(cache, file, data, tokenizer=str(tokenizer_dir))
    train(TrainConfig(cache, run, max_steps=2, lr=1e-3, batch_size=3), one_process(), Silent())
    code, stdout, stderr = cli("export", "--policy", run, "--out", back, "--dtype", dtype)
    assert code == 0 and f"load it as {back}" in " ".join(stdout.split()), stderr
    before, after = (torch.load(path, weights_only=True) for path in (file, back))
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert {value.dtype for value in after.values()} == {torch.float32 if dtype == "float32" else torch.float16}
    assert not any(torch.equal(after[key].float(), before[key].float()) for key in before if "proj" in key)
    policy, again = load_model(str(run / "model")).model.state_dict(), load_model(str(back)).model.state_dict()
    assert policy.keys() == again.keys()
    assert all(torch.equal(policy[key].to(again[key].dtype), again[key]) for key in policy)


def test_a_directory_from_a_run_a_checkpoint_and_a_directory(trained: Path, tmp_path: Path, cli: Cli) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = trained / "checkpoints" / "step-000002"
    for number, policy in enumerate((trained, checkpoint, trained / "model")):
        out = tmp_path / "deep" / str(number)
        code, stdout, stderr = cli("export", "--policy", policy, "--out", out, "--dtype", "bfloat16")
        assert code == 0 and "in bfloat16" in stdout, stderr
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == torch.bfloat16
        source = load_model(str(policy if policy.name == "model" else policy / "model")).model.to(torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
        tokenizer = AutoTokenizer.from_pretrained(out)
        turns = [{"role": "user", "content": "why not"}]
        assert str(tokenizer.apply_chat_template(turns, tokenize=False)).startswith("<|im_start|>user\nwhy not")
    first, second = (load_model(str(tmp_path / "deep" / str(n))).model.state_dict()["lm_head.weight"] for n in (0, 1))
    assert not torch.equal(first, second)
    assert not list(tmp_path.rglob(".*"))


def test_a_model_beside_a_record_of_something_else_is_exported(trained: Path, tmp_path: Path, cli: Cli) -> None:
    """And only what is the result of a run is judged by its record."""
    beside = tmp_path / "beside"
    shutil.copytree(trained / "model", beside / "model")
    (beside / "run.json").write_text('{"name": "of another program"}')
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    record = json.loads((start / "run.json").read_text())
    record["outcome"]["model_step"] = 0
    (start / "run.json").write_text(json.dumps(record))
    (start / "model").rename(start / "base")
    for number, (policy, mark) in enumerate({beside / "model": "✓", start / "base": "✓"}.items()):
        code, stdout, stderr = cli("export", "--policy", policy, "--out", tmp_path / str(number))
        assert code == 0 and stdout.startswith(mark), stderr


def test_a_minimind_file_as_a_directory_needs_a_tokenizer(
    checkpoints: Path, tokenizer_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    file, out = checkpoints / "minimind3-dense.pth", tmp_path / "out"
    assert "holds no tokenizer; add --tokenizer DIR" in refused(cli, "--policy", file, "--out", out)
    assert not out.exists()
    code, _, stderr = cli("export", "--policy", file, "--out", out, "--tokenizer", tokenizer_dir)
    assert code == 0, stderr
    assert load_model(str(out)).fingerprint == load_model(str(file)).fingerprint
    assert (out / "tokenizer.json").is_file()


def test_what_is_there_stays(trained: Path, tmp_path: Path, cli: Cli) -> None:
    """Above all a .pth: it may be the model that the run came from."""
    for name in ("there.pth", "there"):
        (tmp_path / name).write_text("mine")
        line = refused(cli, "--policy", trained, "--out", tmp_path / name)
        assert f"{name}: exists already; name another --out or remove it" in line
        assert (tmp_path / name).read_text() == "mine"
    (tmp_path / "folder").mkdir()
    assert "folder: exists already" in refused(cli, "--policy", trained, "--out", tmp_path / "folder")


@pytest.mark.parametrize("name", ["policy.pt", "policy.bin", "model.safetensors", "policy.gguf", "POLICY.PTH"])
def test_a_file_of_a_kind_that_is_not_written(trained: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    line = refused(cli, "--policy", trained, "--out", tmp_path / name)
    assert f"{name}: expected a name that ends in .pth, or the name of a directory to make" in line
    assert not list(tmp_path.iterdir())


def test_other_mistakes_are_one_line(trained: Path, tmp_path: Path, cli: Cli, tokenizer_dir: Path) -> None:
    out = tmp_path / "x.pth"
    assert "only a model that was loaded from a MiniMind .pth" in refused(cli, "--policy", trained, "--out", out)
    assert "expected a model directory" in refused(cli, "--policy", tmp_path / "gone", "--out", out)
    assert "in float16 or float32" in refused(cli, "--policy", trained, "--out", out, "--dtype", "bfloat16")
    assert "--dtype: expected one of" in refused(cli, "--policy", trained, "--out", out, "--dtype", "fp16")
    assert "--tokenizer: a .pth" in refused(cli, "--policy", trained, "--out", out, "--tokenizer", tokenizer_dir)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(json.dumps({"beta": 0.1}))
    assert "this run has no model yet; wait for its end, go on with it by" in refused(
        cli, "--policy", unfinished, "--out", out
    )
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(cli, "--policy", trained, "--out", tmp_path / "file" / "x")
    assert not out.exists()
