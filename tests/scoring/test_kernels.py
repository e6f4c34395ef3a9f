"""What computes attention over packed rows: each kernel gives what a plain walk over the pairs gives, or is not used."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from minicache.pairs import PairTable
from minicache.processes import devices
from minicache.processes.world import World
from minicache.scoring import layout
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
