"""Frozen weights in the half precision they are stored in: the same bits as in float32, in fewer bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minicache.cache.reader import ReferenceCache
from minicache.models import load_model
from minicache.models.lora import add_lora, with_adapter
from minicache.models.precision import _stacked, half_weights, hold_for, to_float32
from minicache.options.train import LoraOptions
from minicache.pairs import EncodedPair, PairTable
from minicache.processes import devices
from minicache.processes.world import World
from minicache.scoring.probe import probed
from minicache.scoring.scorer import Scorer
from minicache.scoring.spread import spread
from minicache.trackers import Silent
from tests.conftest import precompute_into, tiny_llama
from tests.training.test_resume import assert_same_run, killed_at, run
from tests.zoo.half import compare_half
from tests.zoo.shards import in_shards

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16


@pytest.fixture(scope="module", params=["untied", "tied"])
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> list[Path]:
    """The same numbers stored in bfloat16 and in float32."""
    made = []
    for dtype in (BFLOAT16, torch.float32):
        model: Any = tiny_llama()
        if request.param == "tied":
            model.config.tie_word_embeddings = True
            model.tie_weights()
        directory = tmp_path_factory.mktemp("twin")
        model.to(BFLOAT16).to(dtype).save_pretrained(directory)
        for file in tokenizer_dir.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        made.append(directory)
    return made


def table(pairs: int = 8) -> PairTable:
    random, made = np.random.default_rng(0), []
    for index in range(pairs):
        lengths = (int(random.integers(3, 9)), int(random.integers(1, 20)), int(random.integers(1, 20)))
        counted = np.ones(sum(lengths), np.uint8)
        counted[: lengths[0]] = 0
        made.append(EncodedPair(random.integers(3, 400, sum(lengths)).astype("int32"), counted, lengths, (0, index)))
    return PairTable.from_pairs(made, "int32")


def stored_in(dtype: torch.dtype, tied: bool) -> Any:
    model: Any = tiny_llama()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model.to(dtype).eval().requires_grad_(False)


def bytes_of(model: nn.Module) -> int:
    """Bytes of the storages of a model's parameters, each once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
    return sum(storages.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_and_gradients_are_those_of_float32_weights(dtype: str, tied: bool) -> None:
    found = compare_half(stored_in(getattr(torch, dtype), tied), table(), dtype)
    assert found["scores"] == [] and found["gradients"] == []
    assert found["share"] > (0.99 if tied else 0.5)


def test_a_cache_and_a_lora_run_do_not_depend_on_how_weights_are_stored(
    twins: list[Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From preference file to saved adapter; the run on half weights is killed and resumed on the way."""
    caches = [
        precompute_into(tmp_path / f"cache-{each}", twins[each], data_file, dtype="bfloat16", per_token=True)
        for each in (0, 1)
    ]
    first, second = (ReferenceCache(each).load().reference for each in caches)
    assert np.array_equal(first.logp_mean, second.logp_mean)
    assert first.token_logps is not None and second.token_logps is not None
    assert np.array_equal(first.token_logps, second.token_logps, equal_nan=True)
    options: dict[str, Any] = {"dtype": "bfloat16", "epochs": 1, "lora": LoraOptions(lora_rank=2)}
    killed_at(monkeypatch, 10, caches[0], tmp_path / "half", **options)
    run(caches[0], tmp_path / "half", resume=True, **options)
    run(caches[1], tmp_path / "float32", **options)
    assert_same_run(tmp_path / "half", tmp_path / "float32")


def test_which_weights_stay_in_half_precision() -> None:
    model = stored_in(BFLOAT16, tied=False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(32, dtype=BFLOAT16), requires_grad=False)
    hold_for(model, CPU, "bfloat16")
    half = {name for name, each in model.named_parameters() if each.dtype != torch.float32}
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    assert half == linear - {"model.layers.0.mlp.up_proj.weight"}
    assert {each.dtype for each in stored_in(BFLOAT16, tied=True).parameters()} == {BFLOAT16}


@pytest.mark.parametrize(
    ("stored", "dtype"), [(BFLOAT16, "float32"), (BFLOAT16, "float16"), (torch.float32, "bfloat16")]
)
def test_weights_of_another_precision_than_the_passes_are_float32(stored: torch.dtype, dtype: str) -> None:
    model = hold_for(stored_in(stored, tied=True), CPU, dtype)
    assert {each.dtype for each in model.parameters()} == {torch.float32}


class Scaled(nn.Embedding):
    """As Gemma's: it computes with the precision of its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.Embedding.forward(self, input) * torch.tensor(1.01).to(self.weight.dtype)


def test_a_table_that_does_more_than_look_up_stays_float32_with_its_head() -> None:
    model = stored_in(BFLOAT16, tied=True)
    table = Scaled(400, 32)
    table.weight = model.lm_head.weight
    model.model.embed_tokens = table
    assert id(table.weight) not in half_weights(model, BFLOAT16)
    assert id(model.model.layers[0].mlp.up_proj.weight) in half_weights(model, BFLOAT16)


@pytest.mark.parametrize("what", ["nothing", "shape", "dtype", "numbers"])
def test_a_weight_that_is_read_past_its_layer_becomes_float32(what: str) -> None:
    model = stored_in(BFLOAT16, tied=False)
    layer = model.model.layers[0].mlp.up_proj
    reads: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "shape": lambda: (layer.weight.shape, layer.weight.device),
        "dtype": lambda: layer.weight.dtype,
        "numbers": lambda: layer.weight.sum(),
    }
    model.model.norm.register_forward_pre_hook(lambda *_: (reads[what](), None)[1])
    hold_for(model, CPU, "bfloat16")
    assert probed(model) is not None
    others = model.model.layers[1].mlp.up_proj
    assert layer.weight.dtype == (BFLOAT16 if what in ("nothing", "shape") else torch.float32)
    assert others.weight.dtype == BFLOAT16


def test_new_and_saved_adapters_are_the_same_on_any_base(tmp_path: Path) -> None:
    half, wide = stored_in(BFLOAT16, tied=False), to_float32(stored_in(BFLOAT16, tied=False), CPU)
    made = [add_lora(each, "base", LoraOptions(lora_rank=2), 3, Silent()) for each in (half, wide)]
    factors = [{name: each for name, each in model.named_parameters() if "lora_" in name} for model in made]
    assert {each.dtype for each in factors[0].values()} == {torch.float32}
    assert len(factors[0]) == 28 and all(torch.equal(factors[0][name], factors[1][name]) for name in factors[0])
    adapted: Any = made[0]
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    opened: Any = with_adapter(stored_in(BFLOAT16, tied=False), tmp_path)
    assert opened.get_base_model().lm_head.weight.dtype == BFLOAT16
    assert torch.equal(opened.get_base_model().lm_head.weight, stored_in(BFLOAT16, tied=False).lm_head.weight)
    values = dict(opened.named_parameters())
    assert all(torch.equal(values[name], each) and values[name].requires_grad for name, each in factors[0].items())


def test_the_magnitudes_of_dora_are_computed_from_float32_weights() -> None:
    options = LoraOptions(lora_rank=2, lora_dora=True)
    model = add_lora(stored_in(BFLOAT16, tied=False), "base", options, 3, Silent())
    assert {each.dtype for each in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("adapted", [False, True])
def test_no_float32_copy_is_held(adapted: bool) -> None:
    """Two bytes a weight, of linear layers and of a tied table; the rest of the parameters is known by number."""
    model = stored_in(BFLOAT16, tied=True)
    expected = sum((2 if each.ndim == 2 else 4) * each.numel() for each in model.parameters())
    if adapted:
        model = add_lora(model, "base", LoraOptions(lora_rank=2), 0, Silent())
        expected += sum(4 * each.numel() for name, each in model.named_parameters() if "lora_" in name)
    scorer = spread(model, "bfloat16", "ddp", World(0, 1, CPU))
    assert bytes_of(scorer) == expected
    assert bytes_of(to_float32(scorer.model, CPU)) > 1.7 * expected


def test_a_loaded_model_is_held_as_it_is_stored(twins: list[Path]) -> None:
    loaded = load_model(str(twins[0]))
    before = loaded.fingerprint
    scorer = Scorer(hold_for(loaded.model, CPU, "bfloat16"), "bfloat16")
    assert load_model(str(twins[0])).fingerprint == before
    weight: Any = scorer.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == BFLOAT16


# a skeleton of a model that was never loaded has no name
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_shards_too_hold_weights_as_they_are_stored(adapted: bool, tied: bool) -> None:
    """Each layer is gathered in the precision of the passes: the same bits as from shards in float32. On a mesh of this process."""
    found = {}
    for dtype in (BFLOAT16, torch.float32):
        model = stored_in(BFLOAT16, tied).to(dtype)
        model = add_lora(model, "base", LoraOptions(lora_rank=2), 0, Silent()) if adapted else model
        with in_shards(model, "bfloat16") as scorer:
            sizes = {each.element_size() for each in scorer.parameters() if each.ndim == 2 and not each.requires_grad}
            scores = scorer(scorer.layout.make(table(), np.arange(4)), distribution=True)
            if adapted:
                scores.logp_sum.sum().backward()
            trained: Any = [each for each in scorer.parameters() if each.requires_grad]
            gradients = [each.grad.full_tensor() for each in trained]
        found[dtype] = (sizes, [scores.token_logps.detach(), scores.entropy, *gradients])
    assert found[BFLOAT16][0] == ({2} if tied else {2, 4}) and found[torch.float32][0] == {4}
    assert len(found[BFLOAT16][1]) == (2 + 28 if adapted else 2)
    assert all(torch.equal(*pair) for pair in zip(found[BFLOAT16][1], found[torch.float32][1], strict=True))


def test_the_transposed_layers_of_gpt2_stay_in_half_precision() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    found = compare_half(GPT2LMHeadModel(config), table())
    assert found["scores"] == [] and found["gradients"] == []
    # all but positions, norms and biases
    assert found["share"] > 0.9


def mixture() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
def test_experts_stay_in_half_precision_where_nothing_is_trained(kind: str) -> None:
    """On a CPU torch's grouped product has no autocast: it computes in float32, from weights that are cast in each pass."""
    model = mixture()
    model.config._experts_implementation = kind
    found = compare_half(model, table())
    assert found["scores"] == [] and found["gradients"] == []
    assert found["share"] > 0.8
    held = hold_for(mixture().to(BFLOAT16).requires_grad_(False), CPU, "bfloat16")
    scorer = Scorer(held, "bfloat16")
    with torch.no_grad():
        scorer(scorer.layout.make(table(), np.arange(4)))
    experts: Any = held.get_submodule("model.layers.0.mlp.experts")
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == BFLOAT16
    assert "gate_up_proj" not in vars(experts)


def test_experts_under_adapters_are_float32() -> None:
    adapted = add_lora(mixture().to(BFLOAT16).requires_grad_(False), "base", LoraOptions(lora_rank=2), 0, Silent())
    held = hold_for(adapted, CPU, "bfloat16")
    assert {each.dtype for each in held.parameters() if each.ndim == 3} == {torch.float32}


def passes_of_experts(
    model: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> tuple[set[torch.dtype], list[torch.Tensor]]:
    """The precisions of the grouped products, and the scores and gradients, on a CPU that stands for a kind of device."""
    found: set[torch.dtype] = set()
    product = torch.nn.functional.grouped_mm

    def noted(left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
        assert left.dtype == right.dtype
        found.add(left.dtype)
        return product(left, right, **options)

    scorer = Scorer(model, "bfloat16")
    with monkeypatch.context() as patch, devices.as_if_on(kind):
        patch.setattr(torch.nn.functional, "grouped_mm", noted)
        scores = scorer(scorer.layout.make(table(), np.arange(4)), distribution=True)
        trained = [each for each in scorer.parameters() if each.requires_grad]
        if trained:
            scores.logp_sum.sum().backward()
    for each in trained:
        assert each.grad is not None and each.grad.dtype == each.dtype
    return found, [scores.token_logps.detach(), *(each.grad for each in trained if each.grad is not None)]


@pytest.mark.parametrize("trained", [False, True])
def test_experts_compute_in_half_precision_on_cuda(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen and trained alike, with the same numbers from weights that are stored in half precision."""
    found = {}
    for kind in ("cpu", "cuda"):
        model = mixture().to(BFLOAT16).requires_grad_(trained)
        model = hold_for(model, CPU, "bfloat16")
        dtypes, numbers = passes_of_experts(model, monkeypatch, kind)
        assert dtypes == ({torch.float32} if kind == "cpu" else {BFLOAT16})
        found[kind] = numbers
    for ours, due in zip(found["cuda"], found["cpu"], strict=True):
        # a router may choose others where two are nearly as good
        assert 0 < (ours - due).norm() < 0.2 * due.norm()
    wide = hold_for(mixture().to(BFLOAT16).float().requires_grad_(trained), CPU, "bfloat16")
    _, same = passes_of_experts(wide, monkeypatch, "cuda")
    assert all(torch.equal(*pair) for pair in zip(found["cuda"], same, strict=True))


def test_experts_in_float32_passes_are_float32_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = passes_of_experts(mixture().requires_grad_(False), monkeypatch, "cuda")
    assert found == {BFLOAT16}
    scorer = Scorer(mixture().requires_grad_(False), "float32")
    plain = scorer(scorer.layout.make(table(), np.arange(4))).token_logps
    with devices.as_if_on("cuda"):
        assert torch.equal(scorer(scorer.layout.make(table(), np.arange(4))).token_logps, plain)


@pytest.mark.parametrize(
    ("device", "adapted", "half"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_which_experts_under_adapters_stay_in_half_precision(device: str, adapted: bool, half: bool) -> None:
    """Those that compute in it and have no adapters of their own."""
    targets = "gate_up_proj,down_proj" if adapted else "q_proj,v_proj"
    options = LoraOptions(lora_rank=2, lora_targets=targets)
    model = add_lora(mixture().to(BFLOAT16).requires_grad_(False), "base", options, 3, Silent())
    experts = [each for name, each in model.named_parameters() if each.ndim == 3 and "lora_" not in name]
    assert len(experts) == 4
    kept = _stacked(model, BFLOAT16, torch.device(device))
    assert [id(each) in kept for each in experts] == [half] * 4
