"""The memory of a training step, counted from shapes, against what the allocator of the CPU gave out in a real one."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from minicache.errors import ModelError
from minicache.models import checkpoint_activations
from minicache.models.lora import add_lora
from minicache.models.precision import hold_for
from minicache.options.lora import LoraOptions
from minicache.pairs import EncodedPair, PairTable
from minicache.processes.world import World
from minicache.scoring import budget
from minicache.scoring.budget import layers_that_fit
from minicache.scoring.counter import Counter
from minicache.scoring.counting import counted_pass, run_pass
from minicache.scoring.masks import Windows
from minicache.scoring.memory import How, need_of
from minicache.scoring.scorer import Scorer
from minicache.trackers import Silent
from minicache.training.optim import make_optimizer

COMMON = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "qwen3": ("Qwen3Config", {**COMMON, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", COMMON),
    "mixture": (
        "Qwen3MoeConfig",
        {**COMMON, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
    # most of their weights are in the embedding, and its gradient is as large as the rest of a short pass
    "large vocabulary": ("LlamaConfig", {**COMMON, "vocab_size": 6000}),
    "large vocabulary, tied": ("LlamaConfig", {**COMMON, "vocab_size": 6000, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 600, "n_embd": 64, "n_layer": 6, "n_head": 4}),
}
PAIRS = 5


def scorer_of(family: str, rank: int = 0, dtype: str = "float32", layout: str = "packed") -> Scorer:
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    if rank:
        # stored in the precision of the passes: frozen weights stay in it
        stored = model.to(getattr(torch, dtype)).requires_grad_(False)
        model = hold_for(add_lora(stored, "", LoraOptions(lora_rank=rank), 0, Silent()), torch.device("cpu"), dtype)
    scorer = Scorer(model, dtype)
    scorer.use_layout(layout, Windows.read(model.config, 80))
    return scorer


def pairs(length: int = 120) -> PairTable:
    """Pairs of one length: a third prompt, a third each answer."""
    random, third = np.random.default_rng(0), length // 3
    mask = (np.arange(3 * third) >= third).astype(np.uint8)
    made = [EncodedPair(random.integers(1, 600, 3 * third).astype(np.int32), mask, (third,) * 3) for _ in range(PAIRS)]
    return PairTable.from_pairs(made, "int32")


def allocated(profiled: Any) -> int:
    """The most bytes that the allocator gave out at once while a profile was taken."""
    events = sorted(
        (each.start_ns(), each.nbytes())
        for each in profiled.profiler.kineto_results.events()
        if each.name() == "[memory]"
    )
    return int(max(np.cumsum([size for _, size in events])))


def step(scorer: Any, table: PairTable, optimizer: torch.optim.Optimizer) -> None:
    """A step of two micro-batches."""
    for _ in range(2):
        scores = scorer(scorer.layout.make(table, np.arange(PAIRS)), distribution=True)
        scores.logp_sum.sum().backward()
    torch.nn.utils.clip_grad_norm_([each for each in scorer.parameters() if each.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def foreseen_and_allocated(scorer: Scorer, checkpointing: bool) -> tuple[float, float]:
    """Bytes of a training step at its peak: from shapes, and as allocated by the second real step."""
    table, make = pairs(), scorer.layout.make
    one, two = (make(table, np.arange(count)) for count in (1, 2))
    passes = counted_pass(scorer, one, two, How(training=True, checkpointing=checkpointing))
    need = need_of(scorer, passes, "adamw")
    if checkpointing:
        checkpoint_activations(scorer.model)
    optimizer = make_optimizer(scorer, "adamw", 1e-4, 0.0)
    step(scorer, table, optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(scorer, table, optimizer)
    # the gradients are made within the step
    expected = need.state + need.weights + passes.bytes(PAIRS * passes.slots)
    return expected, need.weights + need.optimizer + allocated(profiled)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [(family, False) for family in FAMILIES]
    + [pytest.param(family, True, marks=pytest.mark.slow) for family in ("llama", "mixture", "large vocabulary, tied")],
)
def test_a_training_step_takes_what_its_shapes_say(family: str, checkpointing: bool) -> None:
    foreseen, real = foreseen_and_allocated(scorer_of(family), checkpointing)
    assert 0.9 < foreseen / real < 1.1


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("family", "rank", "dtype", "layout"),
    [
        ("qwen3", 4, "bfloat16", "packed"),
        pytest.param("llama", 4, "float32", "packed", marks=pytest.mark.slow),
        pytest.param("qwen3", 0, "bfloat16", "shared", marks=pytest.mark.slow),
        pytest.param("gpt2", 4, "bfloat16", "padded", marks=pytest.mark.slow),
    ],
)
def test_so_do_adapters_half_precision_and_other_layouts(
    family: str, rank: int, dtype: str, layout: str, checkpointing: bool
) -> None:
    foreseen, real = foreseen_and_allocated(scorer_of(family, rank, dtype, layout), checkpointing)
    assert 0.9 < foreseen / real < 1.1


def test_a_model_without_marked_layers_cannot_be_checkpointed_selectively(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, table = scorer_of("llama"), pairs()
    monkeypatch.setattr(budget, "layers_of", lambda model: [])
    with pytest.raises(ModelError, match="--selective-checkpointing: this model's code marks no layers"):
        layers_that_fit(scorer, table, "adamw", 64, World(0, 1, torch.device("cpu")), Silent())


@pytest.mark.parametrize("kept", [2, 4])
def test_layers_that_are_not_computed_again_take_no_more_than_was_counted(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the free memory for which so many of six are left whole, and not for less."""
    scorer, table, world = scorer_of("qwen3"), pairs(), World(0, 1, torch.device("cpu"))
    slots = PAIRS * int(scorer.layout.costs(table.lengths).max())

    def fitting(free: float) -> int:
        monkeypatch.setattr(budget, "free_bytes", lambda device, processes: free)
        return layers_that_fit(scorer, table, "adamw", slots, world, Silent())

    low, free = 1e6, 1e8
    while free - low > 1e3:
        middle = (low + free) / 2
        low, free = (middle, free) if fitting(middle) < kept else (low, middle)
    assert fitting(free) == kept and fitting(1e9) == 6 and fitting(1e6) == 0
    weights = sum(each.numel() * each.element_size() for each in scorer.parameters())
    checkpoint_activations(scorer.model, kept)
    optimizer = make_optimizer(scorer, "adamw", 1e-4, 0.0)
    step(scorer, table, optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(scorer, table, optimizer)
    # the optimizer's state is there before the profile
    real = 2 * weights + allocated(profiled)
    assert 0.8 < real / (free * budget.RESERVE) < 1.05


def test_a_pass_without_gradients_keeps_no_layer() -> None:
    scorer, table = scorer_of("llama"), pairs()
    one, two = (scorer.layout.make(table, np.arange(count)) for count in (1, 2))
    found = counted_pass(scorer, one, two, How(training=False))
    batch = scorer.layout.make(table, np.arange(PAIRS))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        scorer(batch, distribution=True)
    assert 0.9 < found.bytes(PAIRS * found.slots) / allocated(profiled) < 1.1
    assert found.slot < 0.5 * counted_pass(scorer, one, two, How(training=True)).slot


def counted_for(family: str, dtype: str, layout: str, kernel: str | None, kind: str = "cuda") -> float:
    """Bytes of a long pair in a training pass."""
    scorer, table = scorer_of(family, 0, dtype, layout), pairs(600)
    scorer.kernel = kernel
    return budget.counted(scorer, table, How(training=True, kind=kind)).bytes(600)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scores_are_counted_where_a_device_makes_them(dtype: str) -> None:
    """Soft caps make them in a walk and under a dense mask; kernels of packed rows never do, nor does plain attention."""
    # of prefix and chosen, and of rejected; float32, kept for backward
    a_layer = 4 * 4 * (400 * 400 + 200 * 400)
    fused = counted_for("gemma2", dtype, "packed", "flex")
    assert counted_for("gemma2", dtype, "packed", "varlen") == fused
    assert counted_for("gemma2", dtype, "packed", "spans") > fused + 6 * a_layer
    assert counted_for("gemma2", dtype, "shared", None) > fused + 6 * a_layer
    plain = counted_for("llama", dtype, "packed", "flex")
    for layout, kernel in (("packed", "spans"), ("shared", None)):
        # the mask itself is made a float one in each layer
        assert plain < counted_for("llama", dtype, layout, kernel) < plain + 3 * a_layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_half_precision_of_experts_on_cuda_is_counted(dtype: str) -> None:
    """Of trained ones the cast weights, which backward reads; their activations are half as large."""
    scorer, table = scorer_of("mixture", 0, dtype), pairs(60)
    there, here = (budget.counted(scorer, table, How(training=True, kind=kind)) for kind in ("cuda", "cpu"))
    cast = 2 * sum(each.numel() for each in scorer.parameters() if each.ndim == 3)
    assert there.slot < here.slot
    assert 0.8 * cast < there.fixed - here.fixed < 1.2 * cast


def test_counting_leaves_the_model_as_it_was() -> None:
    scorer, table = scorer_of("qwen3"), pairs()
    before = {name: each.clone() for name, each in scorer.state_dict().items()}
    batches = [scorer.layout.make(table, np.arange(count)) for count in (1, 2)]
    with torch.no_grad():
        expected = scorer(batches[0]).logp_sum
    counted_pass(scorer, batches[0], batches[1], How(training=True, checkpointing=True, kind="cuda"))
    assert all(torch.equal(each, before[name]) for name, each in scorer.state_dict().items())
    assert all(parameter.grad is None for parameter in scorer.parameters())
    with torch.no_grad():
        assert torch.equal(scorer(batches[0]).logp_sum, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_that_run_are_counted_alike(checkpointing: bool) -> None:
    """The way that is taken where a model's code reads the values of tensors."""
    scorer, table = scorer_of("llama"), pairs()
    one, two = (scorer.layout.make(table, np.arange(count)) for count in (1, 2))
    how = How(training=True, checkpointing=checkpointing)
    slots = PAIRS * one.input_ids.numel()
    assert 0.8 < run_pass(scorer, one, two, how).bytes(slots) / counted_pass(scorer, one, two, how).bytes(slots) < 1.3
    assert all(parameter.grad is None for parameter in scorer.parameters())
    assert not any("forward" in vars(module) for module in scorer.model.modules())


def test_a_counter_counts_what_lives() -> None:
    with Counter() as counter:
        kept = torch.zeros(100)
        torch.zeros(1000)
        view = kept[:10]
    assert (counter.live, counter.peak) == (400, 4400)
    del kept
    assert counter.live == 400
    del view
    assert counter.live == 0
