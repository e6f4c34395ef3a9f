"""A directory that cannot be loaded: the file that is broken or missing is named, with what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache.errors import ModelError
from minicache.models import load_model, save_tokenizer
from minicache.scoring.scorer import Scorer
from tests.conftest import tiny_llama
from tests.helpers.adapters import sft_adapter


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(64)


def broken_safetensors(file: Path, how: str) -> None:
    content = file.read_bytes()
    made = {
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n",
        "page": b"<!DOCTYPE html><html></html>",
        "empty": b"",
        "cut": content[:-100],
        "longer": content + b"x",
        "text": b"weights",
        "header": (10**6).to_bytes(8, "little") + content[8:],
        "offsets": with_header(b'{"a": {"data_offsets": ["x", "y"]}}'),
        "nested": with_header(b"[" * 100_000),
    }
    file.write_bytes(made[how])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pointer", r"model.safetensors: a Git LFS pointer, not the file itself \(123,456 bytes\): run git lfs pull"),
        ("page", r"model.safetensors: a web page, which a download saved in the file's place"),
        ("empty", r"model.safetensors: an empty file; copy or download it again"),
        ("cut", r"model.safetensors: [\d,]+ bytes, where its header says [\d,]+: cut off or damaged"),
        ("longer", r"model.safetensors: [\d,]+ bytes, where its header says [\d,]+: cut off or damaged"),
        ("text", r"model.safetensors: not a safetensors file, or a damaged one"),
        ("header", r"model.safetensors: not a safetensors file, or a damaged one"),
        ("offsets", r"model.safetensors: not a safetensors file, or a damaged one"),
        ("nested", r"model.safetensors: not a safetensors file, or a damaged one"),
    ],
)
def test_a_broken_file_of_weights_is_told_for_what_it_is(how: str, said: str, model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    broken_safetensors(directory / "model.safetensors", how)
    with pytest.raises(ModelError, match=said):
        load_model(str(directory))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", r"config.json: cannot be read as JSON: .*copy or download it again"),
        ("model.safetensors.index.json", "[]", r"index.json: has no weight_map that names files"),
        ("model.safetensors.index.json", '{"weight_map": {}}', r"index.json: has no weight_map that names files"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "names b.safetensors, which is not"),
    ],
)
def test_a_broken_json_file_is_named(name: str, content: str, said: str, model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    if "index" in name:
        (directory / "model.safetensors").unlink()
    (directory / name).write_text(content)
    with pytest.raises(ModelError, match=said):
        load_model(str(directory))


def test_other_files_under_the_name_of_pickled_weights(model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: a safetensors file; rename it to model.safetensors"):
        load_model(str(directory))
    torch.save(tiny_llama(), directory / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"holds more than tensors, which is never run; expected weights alone"
    ) as told:
        load_model(str(directory))
    assert "\x1b" not in str(told.value)


def test_a_directory_that_is_no_model_s(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(model_dir, run / "model")
    with pytest.raises(
        ModelError, match=r"run: no config.json in it; expected a model's directory; did you mean .*run/model\?"
    ):
        load_model(str(run))
    (run / "run.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"run: a run's directory; expected a model's directory; did you mean .*run/model\?"
    ):
        load_model(str(run))
    for file in [*(run / "model").glob("token*"), *(run / "model").glob("special*")]:
        file.unlink()
    with pytest.raises(ModelError, match=r"model: no tokenizer in it .*; add --tokenizer DIR"):
        save_tokenizer(str(run / "model"), tmp_path / "tokenizer", None)


@pytest.mark.parametrize("names", [["model.norm.weight"], ["model.embed_tokens.weight", "lm_head.weight"]])
def test_weights_that_are_no_numbers_are_named(names: list[str]) -> None:
    model = tiny_llama()
    for name in names:
        model.get_parameter(name).data[7] = float("nan")
    listed = re.escape(", ".join(names))
    with pytest.raises(
        ModelError, match=rf"LlamaForCausalLM: NaN or infinity in {len(names)} of its weights \({listed}\)"
    ):
        Scorer(model, "float32")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_broken_adapter_is_told_for_what_it_is(model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install '.[lora]'")
    adapter = sft_adapter(model_dir, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    weights = load_file(file)
    broken_safetensors(file, "pointer")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: a Git LFS pointer"):
        load_model(str(adapter))
    file.write_bytes(whole[:-20])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: .*cut off or damaged"):
        load_model(str(adapter))
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] * float("nan")}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"adapter: NaN or infinity in 1 of its weights \({re.escape(name)}\)"):
        load_model(str(adapter))


def test_files_that_no_loader_reads_are_not_blamed(model_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model_dir, tmp_path / "model")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"model_type": "nobody-knows"}))
    (directory / "data.json").write_text('{"a": 1}\n{"a": 2}\n')
    (directory / "training_args.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"transformers cannot load it: .*nobody-knows"):
        load_model(str(directory))
