"""Loading what users have, saving what others open, and a digest that knows weights and nothing else."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minicache.errors import ModelError
from minicache.models import huggingface, load_model, save_model, save_tokenizer
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import one_process, precompute_into, tiny_llama


@pytest.fixture(scope="session")
def minimind3(checkpoints: Path) -> Path:
    return checkpoints / "minimind3-dense.pth"


def test_a_minimind_user_gets_a_policy(minimind3: Path, tokenizer_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """From a .pth and a tokenizer folder to a Hugging Face directory."""
    from transformers import AutoModelForCausalLM

    cache = precompute_into(tmp_path / "cache", minimind3, data_file, tokenizer=str(tokenizer_dir))
    report = train(TrainConfig(cache, tmp_path / "run", max_steps=2), one_process(), Silent())
    assert report.progress.first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained(report.model_dir).config.model_type == "qwen3"


def test_a_pth_without_a_tokenizer_says_what_to_add(minimind3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--tokenizer DIR"):
        save_tokenizer(str(minimind3), tmp_path / "tokenizer", None)


class Evil:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return (Path.touch, (Path("pwned"),))


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate([{"a": Evil()}, Evil()]):
        torch.save(content, f"{number}.pth")
        with pytest.raises(ModelError, match="never run"):
            load_model(f"{number}.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError):
        load_model("plain.pth")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"), [([1, 2], "dict of tensors"), ({}, "none"), ({"model.x": torch.ones(2)}, "found keys like")]
)
def test_a_pth_of_something_else_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "x.pth"))


def test_a_damaged_pth_is_refused(minimind3: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(minimind3.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cut\.pth"):
        load_model(str(tmp_path / "cut.pth"))


@pytest.mark.parametrize("source", ["no/such/dir", "./nowhere", "missing.pth", "missing.gguf", "org/no-such-model"])
def test_a_model_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(ModelError, match=source.replace(".", r"\.")):
        load_model(source)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json in it; expected a model's directory"):
        load_model(str(tmp_path))


def test_code_that_comes_with_a_model_does_not_run_unasked(model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'pwned')!r}).touch()")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(str(model))
    assert not (tmp_path / "pwned").exists()


def test_the_fingerprint_knows_every_weight_and_no_name(model_dir: Path, tmp_path: Path) -> None:
    original = load_model(str(model_dir)).fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    assert load_model(str(copy)).fingerprint == original
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert load_model(str(copy)).fingerprint != original


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_the_same_weights_computing_something_else_are_another_model(
    model_dir: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    copy = changed_config(model_dir, tmp_path / "copy", lambda config: config | change)
    ids, (before, after) = torch.arange(3, 40)[None], (load_model(str(path)) for path in (model_dir, copy))
    assert not torch.equal(before.model(ids).logits, after.model(ids).logits)
    assert before.fingerprint != after.fingerprint


def test_a_config_written_otherwise_is_no_other_model(model_dir: Path, tmp_path: Path) -> None:
    """As transformers 4 wrote it, with what is default left out, and settings that compute nothing."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        del config["head_dim"], config["rope_parameters"]
        return config | {"rope_theta": 10000, "use_cache": False, "transformers_version": "4.45.0", "eos_token_id": 7}

    copy = changed_config(model_dir, tmp_path / "copy", change)
    assert load_model(str(copy)).fingerprint == load_model(str(model_dir)).fingerprint


def changed_config(source: Path, copy: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(change(config)))
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saving_keeps_every_bit_and_the_precision(tmp_path: Path, tokenizer_dir: Path, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)  # type: ignore[arg-type]  # wrapped by transformers
    save_model(model, tokenizer_dir, tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"))
    assert next(loaded.model.parameters()).dtype == dtype
    for saved, kept in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(saved, kept)
    assert (tmp_path / "saved" / "tokenizer.json").exists() and not list(tmp_path.glob(".*"))


def test_tied_weights_are_written_once_from_gathered_ones_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Each is gathered by itself, so that in memory they are two."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "tie_word_embeddings": True})
    model = LlamaForCausalLM(config)
    gathered = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    save_model(model, tokenizer_dir, tmp_path / "gathered", gathered)
    save_model(model, tokenizer_dir, tmp_path / "plain")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("gathered", "plain"))
    assert found.keys() == expected.keys() and "lm_head.weight" not in found
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A Llama of two layers as a .gguf, quantized to 8 bits, tokenizer and template included."""
    import gguf
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    vocabulary = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["merges"]
    file = tmp_path_factory.mktemp("gguf") / "tiny model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["chat_template"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for key, tensor in tiny_llama(len(vocabulary)).state_dict().items():
        stem = key.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            name = f"blk.{layer}.{parts[part]}"
        else:
            name = names[stem]
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*not writable.*:UserWarning")
def test_a_gguf_goes_all_the_way_and_opens_as_a_plain_model(gguf_file: Path, data_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    cache = precompute_into(tmp_path / "cache", gguf_file, data_file)
    report = train(TrainConfig(cache, tmp_path / "run", max_steps=2, lr=1e-3), one_process(), Silent())
    assert report.progress.first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    config = json.loads((report.model_dir / "config.json").read_text())
    assert "quantization_config" not in config
    opened = AutoModelForCausalLM.from_pretrained(report.model_dir)
    assert next(opened.parameters()).dtype == torch.float32
    original = load_model(str(gguf_file))
    assert not original.model.is_quantized  # transformers' own trainers ask
    save_model(original.model, cache / "tokenizer", tmp_path / "again")
    assert load_model(str(tmp_path / "again")).fingerprint == original.fingerprint


def test_a_hub_that_was_asked_in_vain_is_not_asked_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection each question takes half a minute; another class may be there."""
    monkeypatch.setattr(huggingface, "IN_VAIN", {})
    asked: list[str] = []

    class Missing:
        @classmethod
        def from_pretrained(cls, source: str, **options: Any) -> Any:
            asked.append(cls.__name__)
            raise OSError("no connection")

    class AlsoMissing(Missing):
        pass

    said = set()
    for kind in (Missing, Missing, AlsoMissing):
        with pytest.raises(ModelError, match=r"no hub id that can be loaded: .*no connection") as raised:
            huggingface.from_pretrained(kind, "nobody/nothing", False)
        said.add(str(raised.value))
    assert asked == ["Missing", "AlsoMissing"] and len(said) == 1
