"""A .pth as people hold it: wrapped, nested, in the old form, tied; and what is mistaken for one, each told for what it is."""

import argparse
import gzip
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from minicache.errors import ModelError
from minicache.models import load_model
from tests.conftest import Cli
from tests.references.checkpoints import GENERATIONS, draw

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return draw("minimind2-2510-dense")


@pytest.fixture(scope="module")
def expected(checkpoints: Path) -> str:
    """The fingerprint of the same weights, saved plainly."""
    return load_model(str(checkpoints / "minimind2-2510-dense.pth")).fingerprint


def in_the_middle(state: State, part: str) -> State:
    return {key.replace("self_attn.", f"{part}.self_attn."): value for key, value in state.items()}


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "_fsdp_wrapped_module.",
]
PREFIXES += ["_orig_mod._orig_mod.module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order_are_no_part_of_a_name(state: State, expected: str, tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "x.pth")
    assert load_model(str(tmp_path / "x.pth")).fingerprint == expected


@pytest.mark.parametrize(
    "part", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module"]
)
def test_a_layer_that_was_wrapped_alone_is_found(state: State, expected: str, tmp_path: Path, part: str) -> None:
    torch.save(in_the_middle(state, part), tmp_path / "x.pth")
    assert load_model(str(tmp_path / "x.pth")).fingerprint == expected


def test_two_keys_that_become_one_are_refused(state: State, tmp_path: Path) -> None:
    torch.save(state | {"module.model.norm.weight": torch.ones(64)}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=r"model\.norm\.weight and module\.model\.norm\.weight are both"):
        load_model(str(tmp_path / "x.pth"))


def resume_file(state: State) -> dict[str, Any]:
    """As MiniMind's lm_checkpoint writes it."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    numbers = {"epoch": 1, "step": 300, "world_size": 2, "wandb_id": None}
    return {"model": state, "optimizer": optimizer.state_dict(), **numbers, "scaler": scaler}


WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "resume": (resume_file, "'model'; not used: epoch, optimizer, scaler, step, wandb_id, world_size"),
    "lightning": (
        lambda state: {"state_dict": state, "epoch": 3, "callbacks": {}},
        "'state_dict'; not used: callbacks, epoch",
    ),
    "tutorial": (lambda state: {"model_state_dict": state, "loss": 0.5}, "'model_state_dict'; not used: loss"),
    "deepspeed": (lambda state: {"module": state, "lr_scheduler": None}, "'module'; not used: lr_scheduler"),
    "options": (lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4)}, "'model'; not used: args"),
    "nested": (
        lambda state: {"model": {"state_dict": state, "version": 2}, "step": 1},
        "'model.state_dict'; not used: model.version, step",
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_weights_of_a_training_file_are_used_and_the_rest_is_listed(
    state: State, expected: str, tmp_path: Path, kind: str
) -> None:
    make, said = WRAPPED[kind]
    torch.save(make({f"module.{key}": value for key, value in state.items()}), tmp_path / "x_resume.pth")
    loaded = load_model(str(tmp_path / "x_resume.pth"))
    assert loaded.fingerprint == expected
    (note,) = loaded.notes
    assert note.endswith(f"the weights are those of {said}") and note.startswith(str(tmp_path / "x_resume.pth"))


def test_a_wrapper_alone_leaves_nothing_out(state: State, expected: str, tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "x.pth")
    loaded = load_model(str(tmp_path / "x.pth"))
    assert loaded.fingerprint == expected and not loaded.notes


def test_a_user_sees_what_was_not_used(
    state: State, tmp_path: Path, tokenizer_dir: Path, data_file: Path, cli: Cli
) -> None:
    torch.save(resume_file(state), tmp_path / "x_resume.pth")
    options = ("--model", tmp_path / "x_resume.pth", "--tokenizer", tokenizer_dir, "--data", data_file)
    code, _, err = cli("precompute-ref", *options, "--ref-cache", tmp_path / "cache")
    assert code == 0 and "not used: epoch, optimizer, scaler" in " ".join(err.split())


FORMS: dict[str, Callable[[State], State]] = {
    "parameters": lambda state: {key: nn.Parameter(value) for key, value in state.items()},
    "transposed": lambda state: {key: value.T.contiguous().T for key, value in state.items()},
    "slices of one": lambda state: {
        key: torch.stack([value, value])[1].as_strided(value.shape, value.stride(), value.numel())
        for key, value in state.items()
    },
}


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_how_the_tensors_lie_makes_no_other_model(
    state: State, expected: str, tmp_path: Path, form: str, zipped: bool
) -> None:
    """Nor does the file's form: the second is that of torch before 1.6."""
    torch.save(FORMS[form](state), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_model(str(tmp_path / "x.pth"))
    assert loaded.fingerprint == expected and not any(value.requires_grad for value in loaded.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_precision_is_kept(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "x.pth")
    assert {value.dtype for value in load_model(str(tmp_path / "x.pth")).model.parameters()} == {dtype}


def test_tensors_of_a_gpu_are_read_without_one(state: State, expected: str, tmp_path: Path) -> None:
    """The file says where they lay, in the pickle of each storage."""
    torch.save(state, tmp_path / "cpu.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "cpu.pth").read_bytes()
    assert b"X\x03\x00\x00\x00cpu" in content
    (tmp_path / "x.pth").write_bytes(content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert load_model(str(tmp_path / "x.pth")).fingerprint == expected


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("lost", ["the head", "the embedding"])
def test_of_two_tied_tensors_one_is_enough(checkpoints: Path, tmp_path: Path, generation: str, lost: str) -> None:
    """And the file says which, for an untied model cannot be told from it."""
    state = draw(f"{generation}-dense")
    first, *_, last = state
    left_out, kept = (last, first) if lost == "the head" else (first, last)
    del state[left_out]
    torch.save(state, tmp_path / "x.pth")
    loaded = load_model(str(tmp_path / "x.pth"))
    assert loaded.fingerprint == load_model(str(checkpoints / f"{generation}-dense.pth")).fingerprint
    assert f"{left_out} is not in the file; MiniMind ties it to {kept}" in loaded.notes[0]


class Net(nn.Module):
    """A model that somebody saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


def write(content: bytes) -> Callable[[Path, Path], object]:
    return lambda path, _: path.write_bytes(content)


def store(make: Callable[[], Any], **options: Any) -> Callable[[Path, Path], object]:
    return lambda path, _: torch.save(make(), path, **options)


def save_torchscript(path: Path, _: Path) -> None:
    torch.jit.save(torch.jit.script(Net()), str(path))


def save_zip(path: Path, whole: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(whole, "out/full_sft_512.pth")


def save_tar(path: Path, whole: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(whole, "full_sft_512.pth")


def save_flipped(path: Path, whole: Path) -> None:
    content = whole.read_bytes()
    at = content.index(b"data.pkl") + 100
    path.write_bytes(content[:at] + b"\xff" * 20 + content[at + 20 :])


def cut(share: float, zipped: bool = True) -> Callable[[Path, Path], object]:
    def save(path: Path, whole: Path) -> None:
        torch.save(torch.load(whole), path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return save


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 52428800\n"
LORA = "model.layers.0.self_attn.q_proj.lora."
WITH_LORA = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4), f"{LORA}A.weight": torch.ones(2, 4)}
MISTAKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "empty": (write(b""), "an empty file"),
    "lfs": (write(POINTER), r"a Git LFS pointer, not the file itself \(52,428,800 bytes\): run git lfs pull"),
    "page": (write(b"\n<!DOCTYPE html><html><title>404</title>"), "a web page"),
    "feed": (write(b'<?xml version="1.0"?><Error>AccessDenied</Error>'), "a web page"),
    "text": (write(b"Entry not found"), "a text file .'Entry not found'"),
    "json": (write('{"错误": "不存在"}'.encode()), "a text file"),
    "zeros": (write(bytes(5000)), "begins with zeros"),
    "noise": (write(bytes(range(255, 150, -1))), "not a file that torch.save wrote"),
    "gguf": (write(b"GGUF\x03\0\0\0" + bytes(200)), r"a GGUF file; give its name the ending \.gguf"),
    "safetensors": (lambda path, _: save_file({"a": torch.ones(9)}, path), "a safetensors file; call it model.safetensors"),
    "gzip": (lambda path, whole: path.write_bytes(gzip.compress(whole.read_bytes())), "packed with gzip; unpack it"),
    "tar": (save_tar, "a tar archive"),
    "zip": (save_zip, "a zip archive that torch.save did not write, with out/full_sft_512.pth in it"),
    "torchscript": (save_torchscript, "a TorchScript archive"),
    "half a zip": (cut(0.5), "cut off after [0-9,]+ bytes, or damaged"),
    "all but the end of a zip": (cut(0.999), "cut off after"),
    "half of the old form": (cut(0.5, zipped=False), "cut off or damaged"),
    "a little of the old form": (cut(0.001, zipped=False), "damaged"),
    "flipped bytes": (save_flipped, "damaged"),
    "whole module": (store(Net), r"holds objects of tests\.models\.test_pth_file\.Net, and pickled code is never run"),
    "old whole module": (store(Net, _use_new_zipfile_serialization=False), "pickled code is never run"),
    "a path among numbers": (store(lambda: {"model": {"a": torch.ones(1)}, "at": Path("x")}), r"objects of pathlib"),
    "plain pickle": (write(pickle.dumps({"a": [1.0]})), "a pickle that torch.save did not write"),
    "new protocol": (store(lambda: WITH_LORA, pickle_protocol=4), "a newer pickle protocol"),
    "tensor": (store(lambda: torch.ones(3)), "a Tensor; expected a dict of tensors"),
    "number under model": (store(lambda: {"model": 3, "step": 1}), "no weights: model, step; expected a dict of tensors, or"),
    "optimizer": (store(lambda: {"optimizer": {"state": {}}, "epoch": 1}), "no weights: optimizer, epoch"),
    "a number among tensors": (store(lambda: {"a": torch.ones(1), "epoch": 3}), "dict of tensors.*'epoch' is of type int"),
    "two models": (
        store(lambda: {"model": {"a": torch.ones(1)}, "module": {"a": torch.ones(1)}}),
        "weights under 'model' and 'module'",
    ),
    "lora": (store(lambda: {f"{LORA}{part}.weight": torch.ones(2, 2) for part in "AB"}), "a LoRA file of MiniMind, 2 matrices "),
    "with lora": (store(lambda: {"module." + key: value for key, value in WITH_LORA.items()}), "with LoRA matrices beside"),
    "lora of peft": (store(lambda: {"base_model.model.q_proj.lora_A.weight": torch.ones(2, 2)}), "LoRA matrices of peft"),
    "meta": (store(lambda: {"a": torch.ones(2, device="meta")}), "a is on the meta device"),
    "sparse": (store(lambda: {"a": torch.eye(3).to_sparse()}), "a is a torch.sparse_coo tensor"),
    "fp8": (store(lambda: {"a": torch.ones(2).to(torch.float8_e4m3fn)}), r"a is torch\.float8_e4m3fn: .* not quantized"),
    "int8": (store(lambda: {"a.weight": torch.ones(2).to(torch.int8), "a.SCB": torch.ones(2)}), "not quantized; use the file"),
    "qint8": (
        store(lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}), r"a is torch\.qint8: .* not quantized"
    ),
    "headless": (store(lambda: {"layers.0.self_attn.q_proj.weight": torch.ones(2)}), "expected a checkpoint of MiniMind"),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)
@pytest.mark.parametrize("kind", MISTAKEN)
def test_what_is_no_state_dict_is_told_for_what_it_is(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    make, message = MISTAKEN[kind]
    make(tmp_path / "x.pth", checkpoints / "minimind2-2510-dense.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(tmp_path / "x.pth"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'x.pth'}: ")
    assert "\033" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (None, "a directory; expected a file"),
        ("config.json", "a model directory under a file's name; rename it"),
        (".metadata", "dcp_to_torch"),
    ],
)
def test_a_directory_of_that_name_is_told(tmp_path: Path, inside: str | None, message: str) -> None:
    (tmp_path / "x.pth").mkdir()
    if inside:
        (tmp_path / "x.pth" / inside).write_text("{}")
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "x.pth"))


def test_a_file_that_may_not_be_read_is_one_line(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(checkpoints / "minimind3-dense.pth", tmp_path / "x.pth")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"x\.pth: cannot be read: Permission denied"):
        load_model(str(tmp_path / "x.pth"))
