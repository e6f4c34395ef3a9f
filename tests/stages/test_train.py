"""Stage two: ln 2 at step 0, the handshake, the same curve on any number of processes, a model that opens."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheMismatch, ConfigError, HandshakeError, ModelError, OutputError
from minicache.models import fingerprint
from minicache.options.catalog import LOSSES
from minicache.options.train import LossOptions, TrainConfig
from minicache.scoring.layouts import padded
from minicache.scoring.scorer import Scorer
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training.losses import Logps, sigmoid
from minicache.training.order import Mixture, global_batches
from minicache.training.schedules import learning_rate
from tests.conftest import Cli, make_rows, one_process, precompute_into, tiny_llama, write_jsonl


def run(ref_cache: Path, out: Path, **options: Any) -> TrainReport:
    settings = {"batch_size": 8, "epochs": 2, "lr": 1e-3, "log_every": 1, "beta": 0.1, **options}
    return train(TrainConfig(ref_cache, out, **settings), one_process(), Silent())


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path, name: str = "loss") -> np.ndarray:
    return np.array([line[name] for line in metrics(out)])


@pytest.mark.parametrize("logps", ["mean", "sum"])
def test_step_0_is_ln_2_with_no_margin(ref_cache: Path, tmp_path: Path, logps: str) -> None:
    run(ref_cache, tmp_path / "run", logps=logps, max_steps=1)
    (first,) = metrics(tmp_path / "run")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-9)


def test_training_lowers_the_loss_and_writes_what_the_design_says(ref_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    report = run(ref_cache, out, epochs=4)
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(20)) and report.progress.step == 20
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.02 and lines[-1]["rewards/margin"] > 0.05
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen"}
    assert names | {"logps/rejected", "kl", "lr", "grad_norm", "tokens_per_second", "epoch"} <= lines[0].keys()
    facts = json.loads((out / "run.json").read_text())
    assert facts["beta"] == 0.1 and facts["steps"] == 20 and facts["dtype"] == "float32"
    assert not list(out.glob(".*"))


def test_the_saved_model_opens_and_is_what_was_trained(ref_cache: Path, tmp_path: Path, model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = run(ref_cache, tmp_path / "run", lr=1e-2)
    policy = AutoModelForCausalLM.from_pretrained(report.model_dir)
    reference = AutoModelForCausalLM.from_pretrained(model_dir)
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), reference.parameters(), strict=True)]
    assert all(moved)
    tokenizer = AutoTokenizer.from_pretrained(report.model_dir)
    turns = [{"role": "user", "content": "why not"}]
    assert str(tokenizer.apply_chat_template(turns, tokenize=False)).startswith("<|im_start|>user\nwhy not")
    assert policy.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, pad_token_id=0).shape == (1, 6)


def test_the_curve_equals_a_plain_training_loop(ref_cache: Path, tmp_path: Path, model_dir: Path) -> None:
    """Two live models, one pair at a time, AdamW by hand over the same batches: what the cache is meant to replace."""
    from transformers import AutoModelForCausalLM

    out, lr = tmp_path / "run", 1e-3
    run(ref_cache, out, lr=lr, tokens_per_micro_batch=100)
    table, _ = ReferenceCache(ref_cache).load()
    policy, reference = (AutoModelForCausalLM.from_pretrained(model_dir).eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for step, batch in zip(range(10), global_batches(Mixture.of([np.arange(len(table))]), 8, seed=42), strict=False):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 10, lr, "cosine", 0.1, 0.0)
        total = torch.zeros(())
        for index in batch:
            one = padded(table, np.array([index]))
            with torch.no_grad():
                ref = Scorer(reference, "float32")(one).logp_mean
            scores = Scorer(policy, "float32")(one)
            logps = Logps(scores.logp_mean, ref, scores.token_count, averaged=True)
            total = total + sigmoid(logps, 0.1, LossOptions()).sum() / len(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert np.abs(curve(out) - losses).max() < 1e-5


def test_the_size_of_micro_batches_changes_nothing(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "whole", tokens_per_micro_batch=10**6)
    run(ref_cache, tmp_path / "pieces", tokens_per_micro_batch=1)
    assert np.abs(curve(tmp_path / "whole") - curve(tmp_path / "pieces")).max() < 1e-5


def test_the_same_seed_gives_the_same_run_and_another_seed_another(ref_cache: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(ref_cache, tmp_path / name, seed=seed, max_steps=4)
    assert np.array_equal(curve(tmp_path / "a"), curve(tmp_path / "b"))
    assert not np.array_equal(curve(tmp_path / "a", "logps/chosen"), curve(tmp_path / "c", "logps/chosen"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
def test_two_ranks_give_the_curve_of_one(ref_cache: Path, tmp_path: Path, launcher: str) -> None:
    """40 pairs in batches of 13: the last of an epoch has one pair, so a rank has none."""
    options = ["--batch-size", "13", "--lr", "1e-3", "--epochs", "2", "--log-every", "1", "--beta", "0.1"]
    arguments = ["train", "--ref-cache", str(ref_cache), "--out", str(tmp_path / "two"), *options]
    command = [sys.executable, "-m", "minicache", *arguments, "--nproc", "2"]
    if launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minicache"]
        command = [sys.executable, "-m", *torchrun, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    run(ref_cache, tmp_path / "one", batch_size=13)
    for name in ("loss", "grad_norm", "logps/rejected"):
        assert np.abs(curve(tmp_path / "one", name) - curve(tmp_path / "two", name)).max() < 1e-5, name


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(ref_cache: Path, tmp_path: Path, loss: str) -> None:
    options = {"loss": loss, "loss_options": LossOptions(label_smoothing=0.1, sft_weight=0.1), "epochs": 3, "lr": 3e-3}
    run(ref_cache, tmp_path / "run", **options)
    losses = curve(tmp_path / "run")
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize("loss", ["ipo", "sigmoid:0.5,apo_zero:2"])
def test_no_loss_of_single_pairs_cares_how_the_batch_is_split(ref_cache: Path, tmp_path: Path, loss: str) -> None:
    options = {"loss": loss, "loss_options": LossOptions(sft_weight=0.1), "max_steps": 4}
    run(ref_cache, tmp_path / "whole", tokens_per_micro_batch=10**6, **options)
    run(ref_cache, tmp_path / "pieces", tokens_per_micro_batch=150, **options)
    assert np.allclose(curve(tmp_path / "whole"), curve(tmp_path / "pieces"), rtol=1e-5)


@pytest.mark.parametrize("loss", ["aot", "sigmoid,aot_unpaired"])
def test_a_loss_over_the_batch_is_refused_where_the_batch_is_split(ref_cache: Path, tmp_path: Path, loss: str) -> None:
    with pytest.raises(ConfigError, match="sorts over the whole batch, but 8 pairs make 8 micro-batches"):
        run(ref_cache, tmp_path / "run", tokens_per_micro_batch=1, loss=loss)
    assert not (tmp_path / "run").exists()


def test_beta_and_learning_rate_are_logged_as_they_change(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "run", beta=0.1, beta_end=0.5, max_steps=5, schedule="linear", warmup=1, min_lr=0.5)
    assert np.allclose(curve(tmp_path / "run", "beta"), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert np.allclose(curve(tmp_path / "run", "lr"), 1e-3 * np.array([1, 1, 0.875, 0.75, 0.625]))


def test_log_lines_are_means_over_the_steps_between(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "each", log_every=1)
    run(ref_cache, tmp_path / "some", log_every=4)
    each = curve(tmp_path / "each")
    assert [line["step"] for line in metrics(tmp_path / "some")] == [0, 4, 8, 9]
    expected = [each[0], each[1:5].mean(), each[5:9].mean(), each[9]]
    assert np.allclose(curve(tmp_path / "some"), expected, atol=1e-6)


def test_changed_weights_are_refused_unless_meant(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    cache = precompute_into(tmp_path / "cache", model, data_file)
    tiny_llama(seed=1).save_pretrained(model)
    with pytest.raises(CacheMismatch, match=r"weights digest .* --init-from"):
        run(cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    notes: list[str] = []
    tracker = Silent()
    tracker.note = notes.append  # type: ignore[method-assign, assignment]
    config = TrainConfig(cache, tmp_path / "run", init_from=str(model), max_steps=1)
    train(config, one_process(), tracker)
    assert any("not from the reference" in note for note in notes)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init_from"] == str(model)
    run(cache, tmp_path / "moved", model=str(model_dir), max_steps=1)  # the right weights, elsewhere


def test_a_model_that_computes_otherwise_fails_the_handshake(
    model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights under another setting, and one of those that no digest covers."""
    monkeypatch.setattr(fingerprint, "SETTINGS", ())
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    cache = precompute_into(tmp_path / "cache", model, data_file)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 17.0
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(HandshakeError, match=r"\d+ of 8 pairs re-scored differ .*pair \d+ by \d"):
        run(cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_gone_is_named_with_the_way_out(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    cache = precompute_into(tmp_path / "cache", model, data_file)
    shutil.rmtree(model)
    with pytest.raises(ModelError, match="name the place of the same weights with --model"):
        run(cache, tmp_path / "run")


def test_an_existing_run_is_not_overwritten(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "run", max_steps=1)
    with pytest.raises(OutputError, match="exists already"):
        run(ref_cache, tmp_path / "run", max_steps=1)


def test_a_run_that_diverges_says_so_and_saves_nothing(ref_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="diverged"):
        run(ref_cache, tmp_path / "run", lr=1e30, epochs=3, warmup=0.0)
    assert not (tmp_path / "run" / "model").exists()


def test_bfloat16_stays_near_ln_2(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, dtype="bfloat16")
    run(cache, tmp_path / "run", dtype="bfloat16", max_steps=3)
    assert curve(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=5e-3)


def test_evaluate_sees_what_training_did(ref_cache: Path, model_dir: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "run"
    run(ref_cache, out, epochs=6)
    held_out = precompute_into(
        tmp_path / "held-out", model_dir, write_jsonl(tmp_path / "held-out.jsonl", make_rows(16, seed=9))
    )
    code, stdout, _ = cli("evaluate", "--policy", out, "--ref-cache", ref_cache, "--json")
    trained = json.loads(stdout)
    assert code == 0 and trained["pairs"] == 40 and not trained["same_weights"]
    assert trained["metrics"]["loss"] < 0.69 and trained["metrics"]["rewards/accuracy"] > 0.8
    code, stdout, _ = cli("evaluate", "--policy", model_dir, "--ref-cache", held_out, "--json")
    same = json.loads(stdout)
    assert same["same_weights"] and same["metrics"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert same["metrics"]["accuracy/policy"] == same["metrics"]["accuracy/reference"]
    code, stdout, _ = cli("evaluate", "--policy", out, "--ref-cache", held_out)
    assert code == 0 and "prefers chosen" in stdout and "0.6931" in stdout
    code, stdout, _ = cli("evaluate", "--policy", out, "--ref-cache", held_out, "--loss", "ipo")
    assert code == 0 and "0.6931" not in stdout  # a reference that has not moved has another ipo loss


def test_a_finished_run_whose_policy_is_gone(ref_cache: Path, tmp_path: Path) -> None:
    config = TrainConfig(ref_cache, tmp_path / "run", max_steps=1)
    train(config, one_process(), Silent())
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(
        OutputError, match=r"run: this run is finished, but its policy in .*run/model is gone; expected it there"
    ):
        train(replace(config, resume=True), one_process(), Silent())


def test_a_cache_of_another_reference_is_noted(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    train(TrainConfig(ref_cache, tmp_path / "run", max_steps=1), one_process(), Silent())
    other = shutil.copytree(model_dir, tmp_path / "other")
    tiny_llama(seed=5).save_pretrained(other)
    cache = precompute_into(tmp_path / "cache", other, data_file)
    for given, noted in ((cache, True), (ref_cache, False)):
        code, _, stderr = cli("evaluate", "--policy", tmp_path / "run", "--ref-cache", given)
        assert code == 0 and ("margins are against another reference" in " ".join(stderr.split())) == noted
