"""Held-out pairs: which they are, what they say, when a run ends on their account, and which policy stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.errors import CacheMismatch, ConfigError
from minicache.options.others import EvaluateConfig
from minicache.options.train import LossOptions, TrainConfig, ValidationOptions
from minicache.scoring.batch import Batch, References
from minicache.stages.evaluate import evaluate
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training import checkpoints, loop
from minicache.training import step as steps
from minicache.training.pool import SAME_MODEL
from minicache.training.saving import save_policy
from minicache.training.step import take_step
from minicache.training.validation import references_of
from tests.conftest import Cli, Row, make_rows, one_process, precompute_into, tiny_llama, write_jsonl

SFT = LossOptions(sft_weight=1.0)  # so that random answers have something to teach
SETTINGS = {"batch_size": 8, "max_steps": 8, "lr": 1e-3, "log_every": 3, "save_every": 0, "beta": 0.1}
TIMES = ("tokens_per_second", "memory_gb")


class Killed(BaseException):
    """Ends a run as a kill would."""


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(ref_cache: Path, out: Path, listener: Silent | None = None, **options: Any) -> TrainReport:
    return train(TrainConfig(ref_cache, out, **{**SETTINGS, **options}), one_process(), listener or Silent())


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def outcome(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["outcome"]
    return found


def weights(model: Path) -> dict[str, torch.Tensor]:
    (file,) = model.glob("*.safetensors")
    return load_file(file)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def digests(cache: Path) -> np.ndarray:
    return ReferenceCache(cache).load().table.digest[:, 0]


def rows_of(data: Path, cache: Path, held: np.ndarray) -> list[Row]:
    """The data's rows of these pairs of the cache."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    table = ReferenceCache(cache).load().table
    return [rows[table.source[index, 1] - 1] for index in np.flatnonzero(held)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The digest of every pair that a training step saw."""
    pairs: list[int] = []

    def watching(cached: CachedPairs, options: LossOptions, indices: np.ndarray, batch: Batch) -> References:
        pairs.extend(cached.table.digest[indices, 0].tolist())
        return references_of(cached, options, indices, batch)

    monkeypatch.setattr(steps, "references_of", watching)
    return pairs


def test_the_same_pairs_are_held_out_whatever_is_in_the_cache(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, seen: list[int]
) -> None:
    """A larger cache in another order, another seed; and no step ever sees one of them."""
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(10, seed=5)[::-1])
    grown = precompute_into(tmp_path / "grown", model_dir, more, data_file, block_pairs=16)
    held = {}
    for name, cache, seed in (("a", ref_cache, 1), ("b", grown, 2)):
        seen.clear()
        run(cache, tmp_path / name, seed=seed, max_steps=None, epochs=1, validation=ValidationOptions(holdout=0.3))
        facts = json.loads((tmp_path / name / "run.json").read_text())
        held[name] = set(digests(cache).tolist()) - set(seen)
        assert len(held[name]) == facts["held_out"] and len(set(seen)) == facts["pairs"] == len(seen)
    first = set(digests(ref_cache).tolist())
    assert 4 < len(held["a"]) < 20 and held["b"] & first == held["a"]


@pytest.mark.parametrize(("logps", "beta"), [("mean", 0.3), ("sum", 0.02)])
def test_what_validation_says_is_what_evaluate_says_of_just_these_pairs(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, logps: str, beta: float
) -> None:
    held = digests(ref_cache) < np.uint64(0.3 * 2**64)
    data = write_jsonl(tmp_path / "held.jsonl", rows_of(data_file, ref_cache, held))
    alone = precompute_into(tmp_path / "held", model_dir, data)
    assert set(digests(alone)) == set(digests(ref_cache)[held])
    out = tmp_path / "run"
    run(ref_cache, out, validation=ValidationOptions(holdout=0.3), beta=beta, logps=logps, loss_options=SFT)
    best = outcome(out)
    assert best["model_step"] > 0
    for policy in (
        out,
        out / "model",
        out / "checkpoints" / f"step-{best['model_step']:06d}",
    ):  # all know the run's beta
        report = evaluate(EvaluateConfig(str(policy), alone), one_process(), Silent())
        assert report.settings["beta"] == beta and report.settings["logps"] == logps
        for name, value in best["progress"]["validation"].items():
            assert report.metrics[name] == pytest.approx(value, abs=1e-5), name
    listener = Listener()
    other = tmp_path / "other"
    run(ref_cache, other, listener, validation=ValidationOptions(eval_cache=alone), beta=beta, logps=logps)
    first = next(line for line in lines(other) if "eval/loss" in line)
    assert first["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert any(
        f"{held.sum()} of the {held.sum()} pairs of {alone} are trained on too" in text for text in listener.notes
    )


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_where_beta_changes_every_validation_is_by_the_beta_at_the_end(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, beta: float
) -> None:
    """One scale for all of them, which `evaluate` takes too: the best is the best by it, and not by where beta was lowest."""
    held = digests(ref_cache) < np.uint64(0.3 * 2**64)
    alone = precompute_into(
        tmp_path / "held", model_dir, write_jsonl(tmp_path / "held.jsonl", rows_of(data_file, ref_cache, held))
    )
    out, options = tmp_path / "run", ValidationOptions(holdout=0.3, eval_every=2)
    settings: dict[str, Any] = {"save_every": 2, "keep_last": 99, "lr": 5e-3, "loss_options": SFT}
    run(ref_cache, out, validation=options, beta=0.3, beta_end=beta, **settings)
    found = {line["step"]: line for line in lines(out) if "eval/loss" in line}
    assert sorted(found) == [0, 2, 4, 6, 8] and {line["eval/beta"] for line in found.values()} == {beta}
    assert len({line["beta"] for line in lines(out) if "beta" in line}) > 2
    for step in set(found) & set(checkpoints.steps(out)):
        report = evaluate(EvaluateConfig(str(checkpoints.place(out, step)), alone), one_process(), Silent())
        assert report.settings["beta"] == beta
        assert report.metrics["loss"] == pytest.approx(found[step]["eval/loss"], abs=1e-5)
    assert len(checkpoints.steps(out)) >= 4
    asked = evaluate(EvaluateConfig(str(out), alone, beta=0.3), one_process(), Silent())
    assert asked.settings["beta"] == 0.3


def test_validation_lines_come_at_their_steps_and_one_line_a_step(ref_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(ref_cache, out, validation=ValidationOptions(holdout=0.3, eval_every=2))
    found = lines(out)
    assert [line["step"] for line in found if "eval/loss" in line] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in found if "loss" in line] == [0, 3, 6, 7]
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    assert found[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    run(ref_cache, tmp_path / "default", max_steps=25, validation=ValidationOptions(holdout=0.3))
    default = [line["step"] for line in lines(tmp_path / "default") if "eval/loss" in line]
    assert default == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]


OVERFITS: dict[str, Any] = {
    "lr": 2e-2,
    "max_steps": 60,
    "beta": 1.0,
    "schedule": "constant",
    "warmup": 0.0,
    "loss_options": SFT,
}


def test_the_best_policy_stays_and_patience_ends_the_run(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "run"
    options = ["--lr", "2e-2", "--max-steps", "60", "--beta", "1", "--schedule", "constant", "--warmup", "0"]
    options += ["--holdout", "0.3", "--eval-every", "1", "--patience", "3", "--batch-size", "8"]
    options += ["--save-every", "2", "--sft-weight", "1"]
    code, stdout, stderr = cli("train", "--ref-cache", ref_cache, "--out", out, *options)
    assert code == 0, stderr
    curve = [(line["step"], line["eval/loss"]) for line in lines(out) if "eval/loss" in line]
    best_step, best = min(curve, key=lambda point: point[1])
    last_step = curve[-1][0]
    said = outcome(out)
    assert 0 < said["model_step"] == best_step == last_step - 3 and last_step < 60
    assert said["stopped"] == "no lower validation loss in 3 validations"
    assert "ended early: no lower validation loss in 3 validations" in " ".join(stdout.split())
    assert f"best validation after {best_step} steps: loss {best:.4f}" in " ".join(stdout.split())
    assert best_step in checkpoints.steps(out)
    assert_equal(weights(out / "model"), weights(checkpoints.place(out, best_step) / "model"))
    report = evaluate(EvaluateConfig(str(out), ref_cache), one_process(), Silent())
    assert report.metrics["loss"] != pytest.approx(best, abs=1e-3)  # of all pairs, the trained ones among them
    logged = said["progress"]["last_step"]
    assert logged in [line["step"] for line in lines(out)] and f" {logged} " in stdout


def test_min_gain_makes_small_gains_count_for_nothing(ref_cache: Path, tmp_path: Path) -> None:
    options = ValidationOptions(holdout=0.3, eval_every=1, patience=2, min_gain=0.5)
    report = run(ref_cache, tmp_path / "run", validation=options, loss_options=SFT)
    assert report.progress.step == 2 and report.stopped == "no lower validation loss in 2 validations"
    curve = [line["eval/loss"] for line in lines(tmp_path / "run") if "eval/loss" in line]
    assert report.model_step == int(np.argmin(curve)) > 0  # small as it is, the best is the best


@pytest.mark.parametrize(("save_every", "step"), [(1, 1), (0, 4), (2, 7)])
def test_a_killed_run_resumes_to_the_same_end(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int, step: int
) -> None:
    options: dict[str, Any] = {**OVERFITS, "save_every": save_every}
    options["validation"] = ValidationOptions(holdout=0.3, eval_every=1, patience=2, min_gain=1e-3)
    run(ref_cache, tmp_path / "whole", **options)
    calls = iter(range(10**6))

    def dying(*arguments: Any) -> Any:
        if next(calls) == step:
            raise Killed
        return take_step(*arguments)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "take_step", dying)
        run(ref_cache, out, **options)
    run(ref_cache, out, resume=True, **options)
    assert lines(out) == lines(tmp_path / "whole")
    assert outcome(out)["model_step"] == outcome(tmp_path / "whole")["model_step"]
    assert_equal(weights(out / "model"), weights(tmp_path / "whole" / "model"))


def test_a_run_killed_after_its_patience_ended_still_ends_there(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the model was saved: what lies in model/ is made anew, and no further step is taken."""
    from minicache.stages import train as stage

    options: dict[str, Any] = {**OVERFITS, "save_every": 1, "keep_last": 99}
    options["validation"] = ValidationOptions(holdout=0.3, eval_every=1, patience=2)
    whole = run(ref_cache, tmp_path / "whole", **options)
    out = tmp_path / "killed"

    def dying(*arguments: Any) -> Any:
        save_policy(*arguments)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage, "save_policy", dying)
        run(ref_cache, out, **options)
    assert (out / "model").exists() and "outcome" not in json.loads((out / "run.json").read_text())
    report = run(ref_cache, out, resume=True, **options)
    assert report.progress.step == whole.progress.step and report.stopped == whole.stopped
    assert_equal(weights(out / "model"), weights(tmp_path / "whole" / "model"))


def test_pairs_that_say_nothing_of_this_run_are_refused(
    ref_cache: Path, data_file: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    tiny_llama(seed=1).save_pretrained(other)
    foreign = precompute_into(tmp_path / "foreign", other, data_file)
    with pytest.raises(CacheMismatch, match=r"foreign: weights .* expected the same"):
        run(ref_cache, tmp_path / "run", validation=ValidationOptions(eval_cache=foreign))
    with pytest.raises(
        ConfigError, match=r"--holdout 0.9999: of 40 pairs 40 would be held out; expected some and not all"
    ):
        run(ref_cache, tmp_path / "run", validation=ValidationOptions(holdout=0.9999))
    with pytest.raises(ConfigError, match="so it cannot judge held-out pairs"):
        run(ref_cache, tmp_path / "run", loss="aot", validation=ValidationOptions(holdout=0.5))
    assert not (tmp_path / "run").exists()
    few = precompute_into(tmp_path / "few", model_dir, write_jsonl(tmp_path / "few.jsonl", make_rows(8, seed=8)))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "count_step", lambda *_: (_ for _ in ()).throw(Killed))
        run(ref_cache, tmp_path / "run", validation=ValidationOptions(eval_cache=few))
    with pytest.raises(CacheMismatch, match="not the pairs that this run was validated on before"):
        run(ref_cache, tmp_path / "run", resume=True, validation=ValidationOptions(eval_cache=ref_cache))


@pytest.mark.parametrize("field", ["tokenizer", "template"])
def test_pairs_of_another_tokenizer_or_template_are_refused(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, field: str
) -> None:
    other = shutil.copytree(model_dir, tmp_path / "tokenizer")
    if field == "tokenizer":
        file, old, new = other / "tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'
        text = json.dumps(json.loads(file.read_text()))
    else:
        file, old, new = other / "tokenizer_config.json", "<|im_start|>' + m", "<|im_start|> ' + m"
        text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    foreign = precompute_into(tmp_path / "foreign", model_dir, data_file, tokenizer=str(other))
    same = {name for name in SAME_MODEL if identity(foreign, name) == identity(ref_cache, name)}
    assert same == {*SAME_MODEL} - {field}
    with pytest.raises(CacheMismatch, match=f"foreign: {field} .* expected the same"):
        run(ref_cache, tmp_path / "run", validation=ValidationOptions(eval_cache=foreign))
    assert not (tmp_path / "run").exists()


def identity(cache: Path, name: str) -> object:
    return getattr(ReferenceCache(cache).identity, name)


def test_the_bound_holds_for_tokens_where_they_are_known(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, per_token=True)
    run(cache, tmp_path / "free", **OVERFITS, log_every=1)
    first = next(line for line in lines(tmp_path / "free") if line["kl_tokens"] > 0.2)
    assert first["kl"] < 0.2
    report = run(cache, tmp_path / "run", **OVERFITS, log_every=1, max_kl=0.2, on_max_kl="stop")
    assert report.progress.step == first["step"] + 1 and report.stopped is not None
    assert f"moved {first['kl_tokens']:.3g} nats per token" in report.stopped


@pytest.mark.parametrize("on_max_kl", ["warn", "stop"])
def test_a_policy_that_moves_too_far(ref_cache: Path, tmp_path: Path, on_max_kl: str) -> None:
    listener = Listener()
    report = run(ref_cache, tmp_path / "run", listener, **OVERFITS, log_every=1, max_kl=0.1, on_max_kl=on_max_kl)
    kl = [line["kl"] for line in lines(tmp_path / "run")]
    far = [step for step, value in enumerate(kl) if value > 0.1]
    notes = [text for text in listener.notes if "--max-kl" in text]
    if on_max_kl == "stop":
        assert notes == [] and far == [len(kl) - 1] and report.progress.step == len(kl) < 60
        assert report.stopped is not None and report.stopped.startswith(
            f"the policy has moved {kl[-1]:.3g} nats per token"
        )
        assert outcome(tmp_path / "run")["stopped"] == report.stopped and report.model_dir.is_dir()
    else:
        assert len(notes) == 1 and notes[0].startswith(f"step {far[0]}: ") and report.stopped is None and len(kl) == 60
