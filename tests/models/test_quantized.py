"""Quantized layers: their content is transformers' own, they compute one thing in every batch, and gradients pass through them."""

import copy
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minicache.errors import ConfigError, ModelError
from minicache.models import load_model
from minicache.models.fingerprint import fingerprint
from minicache.models.precision import to_float32
from minicache.models.quantized import compute_in, is_quantized, plain, quantized_layers, weight_count
from minicache.models.stored import turn_back
from minicache.options.base import QUANTIZATIONS, BaseOptions, flag_of
from minicache.scoring.head import Head
from minicache.scoring.scorer import Scorer
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SETTINGS: dict[str, dict[str, Any]] = {"nf4-double": NF4, "int8": {"load_in_8bit": True}}
each_kind = pytest.mark.parametrize("kind", QUANTIZATIONS)


def by_transformers(source: Path, settings: dict[str, Any], **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    load: Any = AutoModelForCausalLM.from_pretrained
    return load(source, quantization_config=make(**settings), dtype="auto", **options).eval()


@pytest.fixture(scope="module")
def half_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A tiny model stored in bfloat16, as most are. Its rows are whole blocks of 4 bits, which bitsandbytes' own forward needs."""
    directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("half") / "model")
    nn.Module.to(tiny_llama(width=64), torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, half_dir: Path) -> dict[str, Path]:
    """The tiny model as transformers and bitsandbytes store it in each quantization, its tokenizer beside it."""
    places = {}
    for kind, settings in SETTINGS.items():
        places[kind] = shutil.copytree(half_dir, tmp_path_factory.mktemp("stored") / kind)
        by_transformers(half_dir, settings).save_pretrained(places[kind])
    return places


def stored_by(source: Path, place: Path, settings: dict[str, Any]) -> Path:
    """A copy of a model whose config.json says that it is quantized in this way."""
    shutil.copytree(source, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return place


def ids(rows: int = 2) -> torch.Tensor:
    return torch.arange(3, 3 + 20 * rows).view(rows, 20) * 7 % 400


@each_kind
def test_the_content_is_what_transformers_makes_and_what_it_stores(
    half_dir: Path, stored: dict[str, Path], kind: str
) -> None:
    ours, theirs = load_model(str(half_dir), False, kind).model, by_transformers(half_dir, SETTINGS[kind])
    again = load_model(str(stored[kind])).model
    for other in (theirs, again):
        expected, found = other.state_dict(), ours.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), kind
    assert len(quantized_layers(ours)) == len(quantized_layers(again)) == 2 * 7
    assert type(ours.get_output_embeddings()) is nn.Linear and Head.of(ours)  # type: ignore[operator]


@each_kind
def test_weights_in_the_identity_are_those_before_and_of_a_stored_checkpoint_its_content(
    half_dir: Path, stored: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    assert load_model(str(half_dir), False, kind).fingerprint == load_model(str(half_dir)).fingerprint
    first, again = load_model(str(stored[kind])), load_model(str(stored[kind]))
    assert first.fingerprint == again.fingerprint != load_model(str(half_dir)).fingerprint
    # also after the layers were told what to compute in
    compute_in(again.model, torch.float16)
    assert again.fingerprint == first.fingerprint
    other = shutil.copytree(half_dir, tmp_path / "other")
    by_transformers(half_dir, SETTINGS[kind] | {"bnb_4bit_quant_type": "fp4"}).save_pretrained(other)
    assert (load_model(str(other)).fingerprint == first.fingerprint) == (kind == "int8")


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_computed_alone_as_in_a_batch_and_with_gradients_as_without(
    half_dir: Path, kind: str, dtype: str
) -> None:
    model: Any = to_float32(load_model(str(half_dir), False, kind).model, CPU)
    # an outlier, for which LLM.int8 would change how the whole batch is rounded
    model.get_input_embeddings().weight.data[ids(4)[3]] *= 40
    scorer = Scorer(model, dtype)
    with scorer._precision(CPU):
        with torch.no_grad():
            alone, batch = (model(rows, use_cache=False).logits[0] for rows in (ids(1), ids(4)))
        model.get_input_embeddings().weight.requires_grad_(True)
        learned = model(ids(1), use_cache=False).logits[0]
    assert (alone - batch).abs().max() <= (2e-5 if dtype == "float32" else 0.15)
    assert torch.equal(alone, learned.detach()) and alone.dtype == (
        torch.float32 if dtype == "float32" else torch.bfloat16
    )


@each_kind
def test_logits_and_gradients_are_those_of_the_weights_it_stands_for(half_dir: Path, kind: str) -> None:
    ours: Any = to_float32(load_model(str(half_dir), False, kind).model, CPU)
    theirs: Any = plain(load_model(str(half_dir), False, kind).model)
    assert is_quantized(ours) and not is_quantized(theirs)
    compute_in(ours, torch.float32)
    grads = []
    for model in (ours, theirs):
        table = model.get_input_embeddings().weight.requires_grad_(True)
        logits = model(ids(), use_cache=False).logits
        logits.log_softmax(-1)[..., 5].sum().backward()
        grads.append((logits.detach(), table.grad))
    (mine, slope), (expected, other) = grads
    assert torch.allclose(mine, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert torch.allclose(slope, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    original: Any = load_model(str(half_dir)).model.float()
    layer, before = (each.model.layers[0].mlp.up_proj.weight for each in (theirs, original))
    # quantized, and close to what it was
    assert 0 < float((layer - before).norm() / before.norm()) < (0.15 if kind == "nf4-double" else 0.02)


def test_rows_that_are_no_multiple_of_a_block(model_dir: Path) -> None:
    """bitsandbytes' own kernel for CPUs with AVX-512 scales them wrongly, by twice the error of the quantization."""
    found = dict(plain(load_model(str(model_dir), False, "nf4-double").model).named_parameters())
    for name, before in load_model(str(model_dir)).model.named_parameters():
        if "_proj" in name:
            assert 0.05 < float((found[name] - before).norm() / before.norm()) < 0.12, name


@each_kind
def test_a_copy_computes_the_same_and_only_plain_weights_become_float32(half_dir: Path, kind: str) -> None:
    model: Any = load_model(str(half_dir), False, kind).model
    twin = copy.deepcopy(model)
    before = {name: value for name, value in twin.state_dict().items() if ".weight" in name and "proj" in name}
    to_float32(twin, CPU)
    for name, value in before.items():
        assert torch.equal(twin.state_dict()[name], value) and twin.state_dict()[name].dtype == value.dtype
    floats = {name: each.dtype for name, each in twin.named_parameters() if each.is_floating_point()}
    assert set(floats.values()) == {torch.float32} and "lm_head.weight" in floats and len(floats) == 2 + 2 * 2 + 1
    for layer in quantized_layers(twin):
        # of the copy's own weights, not of the original's
        assert getattr(layer.forward, "__self__", layer) is layer
    with torch.no_grad():
        assert torch.allclose(twin(ids()).logits, to_float32(model, CPU)(ids()).logits)


def test_an_8_bit_layer_takes_its_scales_along_to_another_device(half_dir: Path) -> None:
    """`Module.to` moves weights and buffers in place, not what bitsandbytes keeps at a weight."""
    model: Any = load_model(str(half_dir), False, "int8").model
    for layer in quantized_layers(model):
        assert "largest" in dict(layer.named_buffers()) and layer.weight.CB is None
    assert not [name for name in model.state_dict() if name.endswith("largest")]


def test_conv_layers_of_gpt2_are_quantized_too() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from minicache.models.quantized import quantize

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3)).eval()
    twin = copy.deepcopy(model)
    quantize(model, "int8")
    assert len(quantized_layers(model)) == 2 * 4
    with torch.no_grad():
        found, expected = (each(ids()).logits for each in (model, twin))
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_model_without_linear_layers_is_refused(half_dir: Path) -> None:
    from minicache.models.quantized import quantize

    model: Any = load_model(str(half_dir)).model
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="--base-4bit: LlamaForCausalLM has no linear layers beside the output layer"):
        quantize(model, "nf4-double")


@each_kind
def test_without_the_packages_one_line_names_the_extra(
    half_dir: Path, stored: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicache.models.quantized.find_spec", lambda package: None)
    for source, asked, what in ((half_dir, kind, flag_of(kind)), (stored[kind], "", "is stored quantized by bitsan")):
        with pytest.raises(ModelError, match=f"{what}.*pip install 'minidpo\\[quantized\\]'"):
            load_model(str(source), False, asked)


@each_kind
def test_what_is_quantized_is_not_quantized_again(stored: dict[str, Path], kind: str) -> None:
    with pytest.raises(ModelError, match=f"its weights are quantized already; leave {flag_of(kind)} out"):
        load_model(str(stored[kind]), False, kind)


@each_kind
def test_a_stored_checkpoint_that_lacks_a_part_is_one_line(stored: dict[str, Path], kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(stored[kind], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    part = "model.layers.1.mlp.up_proj." + ("weight.absmax" if kind == "nf4-double" else "SCB")
    del weights[part]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"its quantized weights cannot be read: .*missing or damaged") as error:
        load_model(str(model))
    assert "\n" not in str(error.value)


def test_a_method_without_a_name_is_told_so(half_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is stored quantized by a method that config\.json does not name"):
        load_model(str(stored_by(half_dir, tmp_path / "model", {"bits": 4})))


def test_the_number_of_weights_is_that_before(half_dir: Path) -> None:
    count = sum(map(weight_count, load_model(str(half_dir)).model.parameters()))
    for kind in QUANTIZATIONS:
        assert sum(map(weight_count, load_model(str(half_dir), False, kind).model.parameters())) == count


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "fbgemm_fp8", "quanto", "aqlm", "bitnet", "of-tomorrow"])
def test_a_method_that_nothing_here_can_train_on_is_told_by_name(half_dir: Path, tmp_path: Path, method: str) -> None:
    model = stored_by(half_dir, tmp_path / "model", {"quant_method": method})
    with pytest.raises(ModelError, match=f"is stored quantized by {method}, which .*an unquantized copy") as error:
        load_model(str(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["torchao", "compressed-tensors"])
def test_a_method_whose_library_is_missing_is_told_by_name(
    half_dir: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicache.models.stored.find_spec", lambda package: None)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    model = stored_by(half_dir, tmp_path / "model", {"quant_method": method})
    with pytest.raises(ModelError, match=f"is stored quantized by {method}.*an unquantized copy") as error:
        load_model(str(model))
    assert "\n" not in str(error.value)


def test_tensors_of_torchao_are_turned_back() -> None:
    class Packed(nn.Parameter):
        def dequantize(self) -> torch.Tensor:
            return self.data * 2

    model: Any = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before, bias = model[0].weight.data.clone(), model[0].bias
    model[0].weight = Packed(model[0].weight.data, requires_grad=False)
    turn_back(model)
    assert type(model[0].weight) is nn.Parameter and torch.equal(model[0].weight, before * 2)
    assert model[0].bias is bias


def test_mxfp4_experts_are_loaded_as_plain_ones(tmp_path: Path) -> None:
    """As gpt-oss stores them: two 4-bit numbers a byte, and a power of two for each 32 of them."""
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
    )
    model = tmp_path / "model"
    nn.Module.to(GptOssForCausalLM(config), torch.bfloat16).save_pretrained(model)
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = weights.pop(name).shape
        # 0.5 and 1 in E2M1, scaled by 2 ** (128 - 127)
        weights[f"{name}_blocks"] = torch.full((experts, columns, rows // 32, 16), 0x21, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, columns, rows // 32), 128, dtype=torch.uint8)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    stored_by(model, tmp_path / "mxfp4", {"quant_method": "mxfp4"})
    loaded: Any = load_model(str(tmp_path / "mxfp4")).model
    found = loaded.model.layers[0].mlp.experts.gate_up_proj
    assert found.dtype == torch.bfloat16 and found.shape == (2, 64, 64)
    assert torch.equal(found[0, :4, 0], torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=torch.bfloat16))


def test_float8_weights_are_loaded_as_plain_ones(half_dir: Path, tmp_path: Path) -> None:
    """As DeepSeek and Qwen store them: float8 with a scale for each block of 128 rows and columns."""
    from safetensors.torch import load_file, save_file

    settings: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    model = stored_by(half_dir, tmp_path / "model", {**settings, "modules_to_not_convert": ["lm_head"]})
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        scale = weights[name].abs().max().float() / 448
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    loaded, original = load_model(str(model)).model, load_model(str(half_dir)).model
    assert not is_quantized(loaded) and not hasattr(loaded.config, "quantization_config")
    for (name, found), expected in zip(loaded.named_parameters(), original.parameters(), strict=True):
        assert found.dtype == torch.bfloat16, name
        assert float((found - expected).float().norm() / expected.float().norm()) < 0.04, name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert load_model(str(tmp_path / "again")).fingerprint == fingerprint(loaded)


def test_both_options_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="--base-4bit, --base-8bit: expected one of them"):
        BaseOptions(base_4bit=True, base_8bit=True)
    assert BaseOptions(base_8bit=True).quantization == "int8" and BaseOptions().quantization == ""


def test_a_model_without_quantized_layers_needs_no_bitsandbytes(
    half_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = load_model(str(half_dir)).model
    assert not is_quantized(model) and to_float32(model, CPU).dtype == torch.float32
