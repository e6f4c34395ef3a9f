"""What computes attention over packed rows: each kernel gives what a plain walk over the pairs gives, or is not used."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from minicache.pairs import PairTable
from minicache.processes import devices
from minicache.processes.world import World
from minicache.scoring import kernels, layout
from minicache.scoring.attention import watching
from minicache.scoring.kernels import Form, Spans, attended
from minicache.scoring.layout import settle_layout
from minicache.scoring.layouts import _as_mask, _as_sequences
from minicache.scoring.masks import block_mask
from minicache.scoring.scorer import Scorer
from tests.helpers import varlen
from tests.scoring.test_families import WINDOWED, Noted, tiny
from tests.scoring.test_scoring import lay_out, random_pairs

CPU = torch.device("cpu")
# start, prefix, chosen, rejected
ROWS = {
    "pairs": [[0, 5, 3, 4], [12, 2, 9, 1], [24, 7, 1, 6]],
    "a branch without tokens": [[0, 5, 0, 4], [9, 3, 2, 0]],
    "no prefix": [[0, 0, 4, 3], [7, 0, 2, 2]],
    "whole sides": [[0, 0, 6, 0], [6, 0, 3, 0], [9, 0, 8, 0]],
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    varlen.register()
    varlen.calls.clear()
    yield
    varlen.wrong[0] = 1.0


def with_gradients(mask: Any, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, of the same numbers each time: 4 heads, 2 of keys, 8 wide."""
    numbers = torch.Generator().manual_seed(3)
    given = [torch.randn(1, heads, length, 8, generator=numbers).bfloat16().to(dtype) for heads in (4, 2, 2)]
    for each in given:
        each.requires_grad_()
    output = attended(given[0], given[1], given[2], mask, Form(scale=0.3))
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), given)]


@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("row", ROWS)
def test_sequences_are_attended_as_spans(row: str, window: int) -> None:
    spans = np.array(ROWS[row])
    length = int(spans[:, 1:].sum())
    mask = _as_mask(spans)
    expected = with_gradients(Spans.of(mask, window), length, torch.float32)
    found = with_gradients(Spans.of(mask, window, _as_sequences(spans)), length, torch.bfloat16)
    assert varlen.calls == [
        {
            "window": window - 1,
            "dtype": torch.bfloat16,
            "sequences": (spans[:, 1:3].sum(1) > 0).sum() + (spans[:, 3] > 0).sum(),
        }
    ]
    for ours, due in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        # a window of one token leaves the query and the key without gradients
        assert (ours.float() - due).norm() < 1e-2 * due.norm() + 1e-5


def settled(model: Any, monkeypatch: pytest.MonkeyPatch, *tried: str, asked: str = "auto") -> tuple[Scorer, list[str]]:
    """The scorer of a model on a device that has these kernels, and what a user is told of its layout."""
    monkeypatch.setattr(layout, "attention_kernels", lambda device, half: tried)
    scorer, tracker = Scorer(model, "bfloat16"), Noted()
    settle_layout(scorer, PairTable.from_pairs(random_pairs(10, seed=6), "int32"), asked, World(0, 1, CPU), tracker)
    return scorer, tracker.notes


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("family", "window"), [("llama", 0), ("mistral", 9), ("gemma3_text", 9)])
def test_a_model_is_scored_by_sequences(
    family: str, window: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**WINDOWED[family], "sliding_window": window} if window else {}
    model, pairs = tiny(family, options).requires_grad_(not frozen), random_pairs(10, seed=6)
    scorer, notes = settled(model, monkeypatch, "varlen", "spans")
    assert (scorer.layout_name, scorer.kernel, notes) == ("packed", "varlen", [])
    assert {call["window"] for call in varlen.calls} == ({-1, window - 1} if family == "gemma3_text" else {window - 1})
    with torch.no_grad():
        found = scorer(lay_out(pairs, "packed")).logp_mean
        scorer.use_layout("padded")
        assert (found - scorer(lay_out(pairs)).logp_mean).abs().max() < 2.5e-2


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_go_to_the_next_kernel(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, notes = settled(tiny(family, WINDOWED[family]), monkeypatch, "varlen", "spans")
    assert (scorer.layout_name, scorer.kernel, notes) == ("packed", "spans", [])


def test_a_kernel_with_other_gradients_is_not_used_by_either_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's stage takes none, and yet must not take another kernel than the policy's."""
    for frozen in (True, False):
        model = tiny("llama", {}).requires_grad_(not frozen)
        varlen.wrong[0] = 1.03
        scorer, _ = settled(model, monkeypatch, "varlen", "spans")
        assert (scorer.layout_name, scorer.kernel) == ("packed", "spans")
        scorer, notes = settled(model, monkeypatch, "varlen", "varlen")
        assert scorer.layout_name == "shared"
        assert re.search(
            r"layout packed is not used: attention by varlen: its gradients of the query differ .* by 0.03", notes[0]
        )
        varlen.wrong[0] = 1.005
        assert settled(model, monkeypatch, "varlen")[0].layout_name == "packed"


def test_only_half_precision_on_cuda_is_attended_by_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        devices.has_flex.cache_clear()
        monkeypatch.setattr(devices, "has_triton", lambda has=has: has)
        last = "flex" if has else "spans"
        found = {
            kind: devices.attention_kernels(torch.device(kind), half=True) for kind in ("cpu", "cuda", "xpu", "mps")
        }
        assert found == {
            "cpu": ("spans",),
            "cuda": ("varlen", last),
            "xpu": (last,),
            "mps": ("spans",),
        }
        assert devices.attention_kernels(torch.device("cuda"), half=False) == (last,)
    devices.has_flex.cache_clear()


def test_sequences_move_with_their_batch() -> None:
    batch = lay_out(random_pairs(3), "packed")
    moved = batch.to(torch.device("meta")).as_sequences
    assert moved and moved.gathered.is_meta and moved.queries.is_meta and moved.most_keys > 0


def test_sinks_that_shards_free_after_the_pass_are_kept_for_the_trial() -> None:
    model = tiny("gpt_oss", WINDOWED["gpt_oss"])
    scorer = Scorer(model, "float32")
    scorer.use_layout("packed")
    with watching() as calls, torch.no_grad():
        scorer(lay_out(random_pairs(3), "packed"))
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    before = [each.detach().clone() for each in sinks]
    for each in sinks:
        # another unit's weights lie there then
        each.data.fill_(torch.nan)
    assert len(calls) == len(sinks)
    for call, expected in zip(calls, before, strict=True):
        assert call.form.sinks is not None and torch.equal(call.form.sinks, expected)


@pytest.mark.parametrize("limited", [True, False])
def test_flex_attention_is_compiled_for_many_forms(limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's limit is 8, beyond which it is not compiled and makes scores. limited: torch.compile takes another one itself."""
    from torch._dynamo.testing import CompileCounter

    compile_: Any = torch.compile
    counter = CompileCounter()

    def compiled(function: Any, dynamic: bool, recompile_limit: int | None = None) -> Any:
        return compile_(function, dynamic=dynamic, backend=counter, recompile_limit=recompile_limit)

    def as_before(function: Any, dynamic: bool) -> Any:
        return compile_(function, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(torch, "compile", compiled if limited else as_before)
    monkeypatch.setattr(kernels, "has_flex", lambda device: True)
    kernels._compiled_flex.cache_clear()
    spans = _as_mask(np.array(ROWS["pairs"]))
    length = int(spans[..., 1:].sum())
    mask = block_mask(spans[0, 0], length)
    try:
        with torch._dynamo.config.patch(recompile_limit=8):
            for width in range(8, 8 + 12):
                query, key, value = torch.randn(3, 1, 2, length, width)
                # a width of its own is one constant more of what is compiled
                attended(query, key, value, mask, Form(scale=1 / width))
    finally:
        kernels._compiled_flex.cache_clear()
        # what is compiled here counts towards the limits of others
        torch._dynamo.reset()
    assert counter.frame_count >= 12


class AsOnCuda:
    """torch's attention, which refuses what its fused kernels for CUDA do not compute (sdp_utils.cpp): it would make scores."""

    def __init__(self) -> None:
        self.grouped: list[bool] = []

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool = False, **options: Any
    ) -> torch.Tensor:
        mask, is_half = options["attn_mask"], query.dtype != torch.float32
        flash = mask is None and is_half and query.shape[-1] <= 192 and devices.has_flash()
        assert flash or query.shape[1] == key.shape[1] == value.shape[1], "neither kernel computes it"
        assert query.dtype == key.dtype == value.dtype
        self.grouped.append(enable_gqa)
        return scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa, **options)


@pytest.mark.parametrize("newest", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spans", "a window", "dense", "causal"])
def test_no_attention_makes_scores_on_cuda(
    kind: str, dtype: torch.dtype, autocast: bool, newest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if these tensors were there: heads are grouped only where FlashAttention computes it. The numbers are the same."""
    spans = np.array(ROWS["pairs"])
    length = int(spans[:, 1:].sum())
    mask: Any = {
        "spans": Spans.of(_as_mask(spans), 0),
        "a window": Spans.of(_as_mask(spans), 4),
        "dense": torch.ones(1, 1, length, length, dtype=torch.bool).tril(),
        "causal": None,
    }[kind]
    monkeypatch.setattr(kernels, "has_flash", lambda: newest)
    monkeypatch.setattr(devices, "has_flash", lambda: newest)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = with_gradients(mask, length, dtype)
        on_cuda = AsOnCuda()
        monkeypatch.setattr(kernels, "scaled_dot_product_attention", on_cuda)
        with devices.as_if_on("cuda"):
            found = with_gradients(mask, length, dtype)
    half = autocast or dtype == torch.bfloat16
    # prefix and chosen of each pair need no mask, its rejected does
    plain = {"spans": [True, False] * 3, "a window": [False] * 6, "dense": [False], "causal": [True]}[kind]
    assert on_cuda.grouped == [each and half and newest for each in plain]
    for ours, due in zip(found, expected, strict=True):
        assert ours.dtype == due.dtype
        assert (ours - due).float().norm() <= (1e-2 if half else 1e-6) * due.float().norm()


def test_heads_are_grouped_no_wider_than_every_card_does() -> None:
    for width, grouped in ((192, True), (256, False)):
        query = torch.zeros(1, 4, 3, width, dtype=torch.bfloat16)
        with devices.as_if_on("cuda"):
            assert kernels._in_groups(query, None) == grouped
        assert kernels._in_groups(query, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_masks_of_flex_attention_compile_once_for_all_lengths() -> None:
    """On a CPU by the C++ compiler, values alone; a GPU's by Triton."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    compiled: Any = torch.compile(flex_attention, dynamic=True, backend=counter)
    numbers = np.random.default_rng(0)
    for pairs in (1, 2, 3, 5, 8, 13, 21):
        lengths = numbers.integers(1, 40, (pairs, 3))
        spans = np.concatenate([np.concatenate([[0], lengths.sum(1).cumsum()[:-1]])[:, None], lengths], 1)
        length = int(lengths.sum())
        query, key, value = torch.randn(3, 1, 2, length, 16)
        mask = _as_mask(spans)
        due = attended(query, key, value, Spans.of(mask, 9), Form())
        found = compiled(query, key, value, block_mask=block_mask(mask[0, 0], length, 9))
        assert torch.allclose(found, due, atol=1e-5)
    # one block of 128 tokens, and many
    assert counter.frame_count <= 2
