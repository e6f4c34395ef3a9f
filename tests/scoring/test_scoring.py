"""The one scorer against a plain computation: row by row, no padding, float64."""

from typing import Any

import numpy as np
import pytest
import torch

from minicache.pairs import EncodedPair, PairTable
from minicache.scoring import head, scorer
from minicache.scoring.batch import Batch
from minicache.scoring.dtype import resolve_dtype
from minicache.scoring.layouts import layout_named
from minicache.scoring.masks import Windows, block_mask, masks_of
from minicache.scoring.scorer import Scorer
from tests.conftest import tiny_llama


def random_pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prefix = random.integers(3, 400, random.integers(2, 12))
        sides: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(2):
            ids = np.concatenate([prefix, random.integers(3, 400, random.integers(1, 20))])
            mask = np.concatenate([random.integers(0, 2, len(prefix)), np.ones(len(ids) - len(prefix), int)])
            mask[0] = 0
            mask[: len(prefix)] = sides[0][1][: len(prefix)] if sides else mask[: len(prefix)]
            sides.append((ids.astype(np.int32), mask.astype(np.uint8)))
        pairs.append(EncodedPair.join(*sides[0], *sides[1]))
    return pairs


def lay_out(pairs: list[EncodedPair], layout: str = "padded") -> Batch:
    return layout_named(layout).make(PairTable.from_pairs(pairs, "int32"), np.arange(len(pairs)))


def plain_logps(model: torch.nn.Module, pair: EncodedPair) -> tuple[list[float], list[int]]:
    """Sum of counted logprobs and their number, of both sides: one unpadded row each, log-softmax and sum in float64."""
    sums, counts = [], []
    for side in (0, 1):
        ids, mask = pair.side(side)
        with torch.no_grad():
            logits = model.double()(torch.tensor(ids[None].astype(np.int64))).logits[0]
        logps = logits.log_softmax(-1)
        sums.append(sum(logps[at - 1, ids[at]].item() for at in range(1, len(ids)) if mask[at]))
        counts.append(int(mask[1:].sum()))
    return sums, counts


def test_scores_equal_the_plain_float64_computation() -> None:
    model, pairs = tiny_llama(), random_pairs(12)
    with torch.no_grad():
        scores = Scorer(model, "float32")(lay_out(pairs))
    expected = [plain_logps(model, pair) for pair in pairs]
    counts = torch.tensor([counts for _, counts in expected])
    means = torch.tensor([sums for sums, _ in expected], dtype=torch.float64) / counts
    assert torch.equal(scores.token_count.long(), counts)
    assert (scores.logp_mean - means).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["shared", "packed", "sequences"])
def test_every_layout_scores_alike(layout: str) -> None:
    model, pairs = tiny_llama(), random_pairs(12, seed=4)
    expected, found = lay_out(pairs), lay_out(pairs, layout)
    with torch.no_grad():
        plain, other = (
            Scorer(model, "float32", name)(batch, distribution=True)
            for name, batch in (("padded", expected), (layout, found))
        )
    for name in ("logp_sum", "token_count", "entropy", "alignment"):
        assert torch.allclose(getattr(plain, name), getattr(other, name), atol=1e-5), name
    tokens, masks = (np.concatenate([getattr(pair, name) for pair in pairs]) for name in ("tokens", "loss_mask"))
    if layout == "sequences":
        assert sorted(found.places.tolist()) == sorted(expected.places.tolist())
    else:
        assert found.places.tolist() == np.flatnonzero(masks).tolist(), "each counted token is predicted once"
    assert np.array_equal(found.targets.numpy(), tokens[found.places.numpy()])
    assert found.input_ids.numel() < expected.input_ids.numel()
    assert len(found.read) == len(expected.read) == sum(len(pair.side(side)[0]) for pair in pairs for side in (0, 1))


def long_pairs() -> list[EncodedPair]:
    """Prefixes and answers shorter and longer than a block of FlexAttention, also with none in common."""
    random = np.random.default_rng(3)
    pairs = []
    for prefix, chosen, rejected in [
        (300, 5, 140),
        (0, 260, 260),
        (1, 1, 1),
        (0, 2, 2),
        (127, 1, 300),
        (128, 128, 128),
    ]:
        mask = np.ones(prefix + chosen + rejected, np.uint8)
        mask[0] = 0
        mask[chosen] *= prefix > 0
        pairs.append(EncodedPair(random.integers(3, 400, len(mask)).astype(np.int32), mask, (prefix, chosen, rejected)))
    return pairs


def test_a_packed_rows_blocks_are_those_of_its_mask() -> None:
    """What FlexAttention is told of each block of 128 x 128, against the mask written out."""
    batch = lay_out(long_pairs(), "packed")
    assert batch.mask is not None
    length = batch.input_ids.shape[1]
    seen = np.zeros((length, length), bool)
    for start, prefix, chosen, rejected in batch.mask[0, 0].tolist():
        middle, end = start + prefix + chosen, start + prefix + chosen + rejected
        for query in range(start, end):
            seen[query, start : query + 1] = True
            if query >= middle:
                seen[query, start + prefix : middle] = False
    found = block_mask(batch.mask[0, 0], length)
    blocks = -(-length // 128)
    padded = np.zeros((blocks * 128, blocks * 128), bool)
    padded[:length, :length] = seen
    tiles = padded.reshape(blocks, 128, blocks, 128).swapaxes(1, 2)
    whole, seen_in_part = np.asarray(tiles.all((2, 3))), np.asarray(tiles.any((2, 3)))
    expected = {"whole": whole, "partial": seen_in_part & ~whole}
    listed = {
        "whole": (found.full_kv_num_blocks, found.full_kv_indices),
        "partial": (found.kv_num_blocks, found.kv_indices),
    }
    for kind, (counts, indices) in listed.items():
        assert counts is not None and indices is not None
        for row in range(blocks):
            assert (
                sorted(indices[0, 0, row, : counts[0, 0, row]].tolist()) == np.flatnonzero(expected[kind][row]).tolist()
            )
        assert expected[kind].any()
    at = torch.arange(length)
    assert np.array_equal(found.mask_mod(at[0], at[0], at[:, None], at[None]).numpy(), seen)


def as_on_a_gpu(batch: Batch, windows: Windows, kernel: str) -> Any:
    return masks_of(batch, windows, "flex")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_scores_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain form of FlexAttention, which runs on a CPU: what a GPU runs compiled."""
    model, pairs = tiny_llama().requires_grad_(False), long_pairs()
    monkeypatch.setattr(scorer, "masks_of", as_on_a_gpu)
    with torch.no_grad():
        plain, found = (Scorer(model, "float32", layout)(lay_out(pairs, layout)) for layout in ("padded", "packed"))
    assert torch.allclose(plain.logp_sum, found.logp_sum, atol=1e-3)
    assert torch.allclose(plain.logp_mean, found.logp_mean, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "shared", "packed", "sequences"])
@pytest.mark.parametrize("chunk", [3, 10**6])
def test_gradients_of_every_layout_equal_the_plain_ones(
    layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 one by one, of a weighted sum over both sides; the head in chunks of 3 positions or in one."""
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", 400 * chunk)
    pairs, weights = random_pairs(7, seed=5), torch.linspace(-1, 2, 14).view(7, 2)
    model = tiny_llama()
    (Scorer(model, "float32", layout)(lay_out(pairs, layout)).logp_mean * weights).sum().backward()
    plain = tiny_llama().double()
    total = torch.zeros((), dtype=torch.float64)
    for index, pair in enumerate(pairs):
        for side in (0, 1):
            ids, mask = (torch.tensor(column.astype(np.int64)) for column in pair.side(side))
            logps = plain(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            total = total + weights[index, side] * (logps * mask[1:]).sum() / mask[1:].sum()
    total.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


def test_gradients_equal_those_of_the_plain_computation() -> None:
    pairs = random_pairs(5, seed=3)
    model = tiny_llama()
    Scorer(model, "float32")(lay_out(pairs)).logp_mean[:, 0].sum().backward()
    plain = tiny_llama().double()
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        ids, mask = (torch.tensor(column.astype(np.int64)) for column in pair.side(0))
        logps = plain(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        total = total + (logps * mask[1:]).sum() / mask[1:].sum()
    total.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6 * theirs.grad.abs().max().item())


def test_what_a_batch_is_made_of_changes_no_value() -> None:
    scorer, pairs = Scorer(tiny_llama(), "float32"), random_pairs(16, seed=1)
    with torch.no_grad():
        together = scorer(lay_out(pairs)).logp_mean
        alone = torch.cat([scorer(lay_out([pair])).logp_mean for pair in pairs])
        backwards = scorer(lay_out(pairs[::-1])).logp_mean.flip(0)
    assert (together - alone).abs().max() < 1e-5
    assert (together - backwards).abs().max() < 1e-5


def test_token_logps_lie_where_their_places_say() -> None:
    pairs = random_pairs(6, seed=2)
    batch = lay_out(pairs)
    with torch.no_grad():
        scores = Scorer(tiny_llama(), "float32")(batch)
    tokens = np.concatenate([pair.tokens for pair in pairs])
    masks = np.concatenate([pair.loss_mask for pair in pairs])
    assert np.array_equal(tokens[batch.places.numpy()], batch.targets.numpy())
    assert set(batch.places.tolist()) == set(np.flatnonzero(masks).tolist())
    values: dict[int, float] = {}
    for place, logp in zip(batch.places.tolist(), scores.token_logps.tolist(), strict=True):
        assert values.setdefault(place, logp) == pytest.approx(logp, abs=1e-5)  # a shared token, from either side


class OtherHead(torch.nn.Linear):
    """A head of a kind of its own: what it computes is not ours to assume."""


def test_a_head_of_another_kind_is_the_models_own_business() -> None:
    """Only the counted positions reach it, and afterwards it is as before."""
    model, pairs = tiny_llama(), random_pairs(4)
    batch = lay_out(pairs)
    with torch.no_grad():
        expected = Scorer(model, "float32")(batch, distribution=True)
        model.lm_head.__class__ = OtherHead
        scorer, seen = Scorer(model, "float32"), []
        model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
        found = scorer(batch, distribution=True)
        whole = model(batch.input_ids).logits
    assert scorer.head is None and seen == [(1, len(batch.sources), 400), tuple(whole.shape)]
    for name in ("logp_sum", "entropy", "alignment"):
        assert torch.allclose(getattr(expected, name), getattr(found, name), atol=1e-5), name


SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Beside plain families: Gemma 2 caps its logits after the head, Granite and Cohere scale them, Mistral's window slides.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_as_it_computes_itself(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})).eval()
    pairs = random_pairs(4)
    with torch.no_grad():
        scorer = Scorer(model, "float32")
        scores = scorer(lay_out(pairs))
    assert scorer.head is not None
    for index, pair in enumerate(pairs):
        sums, _ = plain_logps(model, pair)
        assert np.allclose(scores.logp_sum[index].numpy(), sums, rtol=1e-5, atol=1e-4)


def test_dropout_does_not_disturb_step_0() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    scorer, batch = Scorer(model.train(), "float32"), lay_out(random_pairs(3))
    assert torch.equal(scorer(batch).logp_sum, scorer(batch).logp_sum)


def test_half_precision_scores_come_as_float32_and_near() -> None:
    pairs = random_pairs(8)
    with torch.no_grad():
        exact = Scorer(tiny_llama(), "float32")(lay_out(pairs)).logp_mean
        rounded = Scorer(tiny_llama(), "bfloat16")(lay_out(pairs)).logp_mean
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.2


def test_auto_precision_is_float32_without_a_gpu() -> None:
    assert resolve_dtype("auto", torch.device("cpu"), print) == "float32"
    assert resolve_dtype("bfloat16", torch.device("cpu"), print) == "bfloat16"
