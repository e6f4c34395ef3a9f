"""MiniMind checkpoints written back: the original's keys, every bit, and nothing in place of a file that cannot be written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minicache import drafts
from minicache.errors import ModelError, OutputError
from minicache.models import load_model, save_model, save_pth
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import one_process, precompute_into, tiny_llama
from tests.models.test_minimind import distance, logits_of
from tests.references.checkpoints import NAMES, some_ids


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_goes_through_a_directory_and_comes_back_bit_for_bit(
    checkpoints: Path, tmp_path: Path, tokenizer_dir: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    file, directory = checkpoints / f"{name}.pth", tmp_path / "saved"
    ids, original = some_ids(), load_model(str(file))
    save_model(original.model, tokenizer_dir, directory)
    again = load_model(str(directory))
    assert again.fingerprint == original.fingerprint
    expected = logits_of(original.model, ids)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(directory), ids), expected)
    stored = torch.load(file, weights_only=True)
    for model in (original.model, again.model):
        for dtype in (torch.float32, torch.float16):
            out = tmp_path / "back.pth"
            assert save_pth(model, out, str(dtype).removeprefix("torch.")) == str(out)
            back = torch.load(out, weights_only=True)
            assert back.keys() == stored.keys()
            assert all(torch.equal(back[key], value.to(dtype)) for key, value in stored.items())
            assert len({value.untyped_storage().data_ptr() for value in back.values()}) == len(back)
    assert distance(logits_of(load_model(str(out)).model.float(), ids), expected) < 0.02
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("minimind2-2504-dense", "heads=16,kv_heads=4,rms_eps=1e-06,rope_theta=10000.0"),
        ("minimind2-2510-moe", "experts_per_token=3"),
        ("minimind3-moe", "experts_per_token=2,rms_eps=1e-05"),
    ],
)
def test_the_name_of_a_saved_file_says_what_the_file_does_not(
    checkpoints: Path, tmp_path: Path, tokenizer_dir: Path, name: str, said: str
) -> None:
    original = load_model(f"{checkpoints / name}.pth:{said}")
    assert original.fingerprint != load_model(f"{checkpoints / name}.pth").fingerprint
    save_model(original.model, tokenizer_dir, tmp_path / "saved")
    again = save_pth(load_model(str(tmp_path / "saved")).model, tmp_path / "back.pth", "float32")
    assert again == f"{tmp_path / 'back.pth'}:{said}"
    assert load_model(again).fingerprint == original.fingerprint


@pytest.mark.parametrize("name", ["minimind2-2504-moe", "minimind3-moe"])
def test_a_trained_mixture_goes_back_to_its_file(
    checkpoints: Path, tokenizer_dir: Path, data_file: Path, tmp_path: Path, name: str
) -> None:
    file = checkpoints / f"{name}.pth"
    cache = precompute_into(tmp_path / "cache", file, data_file, tokenizer=str(tokenizer_dir))
    report = train(TrainConfig(cache, tmp_path / "run", max_steps=2, lr=1e-3), one_process(), Silent())
    assert report.progress.first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    trained = load_model(str(report.model_dir))
    assert load_model(save_pth(trained.model, tmp_path / "policy.pth", "float32")).fingerprint == trained.fingerprint
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "policy.pth"))
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_what_came_from_no_checkpoint_becomes_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"only a model that was loaded from a MiniMind \.pth"):
        save_pth(tiny_llama(), tmp_path / "x.pth", "float32")
    assert not list(tmp_path.iterdir())


def test_saving_says_what_stands_in_the_way(checkpoints: Path, tmp_path: Path) -> None:
    model = load_model(str(checkpoints / "minimind3-dense.pth")).model
    with pytest.raises(ModelError, match="in bfloat16: expected float32 or float16"):
        save_pth(model, tmp_path / "x.pth", "bfloat16")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.pth").mkdir()
    for place, said in (("file/x.pth", "cannot be written"), ("taken.pth", "is a directory")):
        with pytest.raises(OutputError, match=said):
            save_pth(model, tmp_path / place, "float32")
    model.get_parameter("model.norm.weight").data[0] = 1e6
    with pytest.raises(ModelError, match=r"model.norm.weight holds numbers that are not finite in float16"):
        save_pth(model, tmp_path / "x.pth", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.pth"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_file_that_was_there(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.pth"
    shutil.copy(checkpoints / "minimind3-dense.pth", target)
    before = target.read_bytes()
    draft = tmp_path / "draft"
    draft.symlink_to("/dev/full")
    monkeypatch.setattr(drafts, "draft_of", lambda place: draft)
    with pytest.raises(OutputError, match="cannot be written"):
        save_pth(load_model(str(checkpoints / "minimind3-moe.pth")).model, target, "float32")
    assert target.read_bytes() == before
