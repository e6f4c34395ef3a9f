"""Families whose attention has windows, soft caps, sinks or code of its own, in every layout against float64, with gradients."""

import copy
import importlib
from typing import Any

import numpy as np
import pytest
import torch

from minicache.errors import ConfigError, ModelError
from minicache.pairs import EncodedPair, PairTable
from minicache.processes.world import World
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.trackers import Silent
from tests.scoring.test_scoring import as_on_a_gpu, lay_out, plain_logps, random_pairs

CPU = torch.device("cpu")


class Noted(Silent):
    """Keeps what a user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


PLAIN = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
# family -> settings of a model with windows; the window itself is set by the test
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mixtral": EXPERTS,
    "phi3": {},
    "starcoder2": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.7, **MIXED},
    "gemma3_text": {"query_pre_attn_scalar": 8, **MIXED},
    "gemma3n_text": {
        **MIXED, "num_hidden_layers": 4, "layer_types": MIXED["layer_types"] * 2, "intermediate_size": [64] * 4,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "num_kv_shared_layers": 2, "laurel_rank": 4,
        "altup_num_inputs": 2, "altup_active_idx": 0, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        **MIXED, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "global_head_dim": 16,
        "num_global_key_value_heads": 2, "num_kv_shared_layers": 0,
    },
    "cohere2": MIXED,
    "olmo3": MIXED,
    "exaone4": MIXED,
    "ministral": MIXED,
    "gpt_oss": {**EXPERTS, **MIXED},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "alibi": False},
    "llama4_text": {
        **EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "attention_chunk_size": 128, "moe_layers": [1],
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "stablelm": {},
    "gpt_neox": {},
    "phi": {},
}  # fmt: skip


def tiny(family: str, settings: dict[str, Any]) -> Any:
    """A random model in which every weight matters: norms, biases and sinks too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    chosen = {name: value for name, value in {**PLAIN, **settings}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **chosen))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 and "scale" not in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def check_layout(model: Any, expected: str, asked: str = "auto", within: float = 1e-5) -> None:
    """The layout that is used, its values within 1e-5 of float64 a pair, gradients `within` of float64."""
    pairs, weights = random_pairs(10, seed=6), torch.linspace(-1, 2, 20).view(10, 2)
    scorer, tracker = Scorer(model, "float32"), Noted()
    settle_layout(scorer, PairTable.from_pairs(pairs, "int32"), asked, World(0, 1, CPU), tracker)
    assert scorer.layout_name == expected, tracker.notes
    scores = scorer(lay_out(pairs, expected))
    (scores.logp_mean * weights).sum().backward()
    found = {name: weight.grad.double() for name, weight in model.named_parameters() if weight.grad is not None}
    scorer.use_layout("padded")
    model.zero_grad(set_to_none=True)
    plain = model.double()
    # the grouped products of experts know no float64
    plain.set_experts_implementation("eager")
    means = torch.tensor(
        [[total / count for total, count in zip(*plain_logps(plain, pair), strict=True)] for pair in pairs]
    )
    assert (scores.logp_mean.detach() - means).abs().max() < 1e-5
    for index, pair in enumerate(pairs):
        for side in (0, 1):
            ids, mask = (torch.tensor(column.astype(np.int64)) for column in pair.side(side))
            logps = plain(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            (weights[index, side] * (logps * mask[1:]).sum() / mask[1:].sum()).backward()
    due = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in due.values()]).norm()
    for name, gradient in due.items():
        assert (found[name] - gradient).norm() < within * norm, name


@pytest.mark.parametrize("layout", ["packed", pytest.param("shared", marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [4096, 9])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_windowed_family_branches(family: str, window: int, layout: str) -> None:
    """Whether no side reaches the window, or it bites: then it counts positions in the branch."""
    check_layout(tiny(family, {**WINDOWED[family], "sliding_window": window}), layout, asked=layout)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_with_code_of_its_own_is_packed(family: str) -> None:
    check_layout(tiny(family, OTHERS[family]), "packed")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [4096, 9])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_flex_attention_knows_windows_caps_and_sinks(family: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain form of FlexAttention, which runs on a CPU, forward only: what a GPU runs compiled."""
    model = tiny(family, {**WINDOWED[family], "sliding_window": window}).requires_grad_(False)
    monkeypatch.setattr("minicache.scoring.scorer.masks_of", as_on_a_gpu)
    pairs, scorer = random_pairs(10, seed=6), Scorer(model, "float32")
    settle_layout(scorer, PairTable.from_pairs(pairs, "int32"), "packed", World(0, 1, CPU), Silent())
    with torch.no_grad():
        found = scorer(lay_out(pairs, "packed")).logp_mean
        scorer.use_layout("padded")
        assert (found - scorer(lay_out(pairs)).logp_mean).abs().max() < 1e-5


def settled(model: Any, asked: str = "auto") -> tuple[Scorer, list[str]]:
    """The scorer of a model, and what a user is told of its layout."""
    scorer, tracker = Scorer(model, "float32"), Noted()
    settle_layout(scorer, PairTable.from_pairs(random_pairs(10, seed=6), "int32"), asked, World(0, 1, CPU), tracker)
    return scorer, tracker.notes


@pytest.mark.parametrize(
    ("chunk", "expected"), [(64, "packed"), (9, "padded")], ids=["no side reaches the chunk", "a side is cut"]
)
def test_chunks_of_attention_are_kept_where_they_cut(chunk: int, expected: str) -> None:
    model = tiny("llama4_text", {**OTHERS["llama4_text"], "attention_chunk_size": chunk})
    scorer, notes = settled(model)
    assert scorer.layout_name == expected
    assert not notes if expected == "packed" else "chunks of 9 tokens, and a side has" in notes[0]
    assert model.config._attn_implementation == ("minicache_spans" if expected == "packed" else "sdpa")


class NotCausal(torch.nn.Module):
    """Adds what it reads of the last token to every token."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        read: torch.Tensor = self.inner(ids)
        return read + read[:, -1:]


def test_what_reads_ahead_is_refused() -> None:
    model = tiny("llama", {})
    model.model.embed_tokens, inner = NotCausal(model.model.embed_tokens), model.model.embed_tokens
    model.get_input_embeddings = lambda: inner
    with pytest.raises(ModelError, match="LlamaForCausalLM is not causal: changing a token moved"):
        Scorer(model, "float32")
    encoder = {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 64}
    with pytest.raises(ModelError, match="as is_decoder"):
        Scorer(tiny("bert", encoder), "float32")
    Scorer(tiny("bert", {**encoder, "is_decoder": True}), "float32")


def test_an_error_of_a_models_own_code_is_one_line() -> None:
    model = tiny("llama", {})
    scorer = Scorer(model, "float32")
    model.model.layers[1].mlp.forward = lambda hidden: hidden @ torch.ones(3, 3)
    with pytest.raises(ModelError, match="LlamaForCausalLM: its own code failed: mat1 and mat2"):
        scorer(lay_out(random_pairs(2)))


def swapped(pair: EncodedPair) -> EncodedPair:
    """The pair with its sides exchanged, so that the rejected one is computed first."""
    return EncodedPair.join(*pair.side(1), *pair.side(0))


ROTARY: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 2.0, 1.5], "factor": 2.0,
        "original_max_position_embeddings": 16, "rope_theta": 1e4,
    },
}  # fmt: skip


@pytest.mark.parametrize(("trained", "expected"), [(16, "padded"), (64, "packed")])
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_that_look_at_the_batch_score_each_side_alone(kind: str, trained: int, expected: str) -> None:
    """Beyond the trained length the frequencies follow from a sequence's own length, in any company and order."""
    parameters = ROTARY[kind] | ({"original_max_position_embeddings": trained} if kind == "longrope" else {})
    model = tiny(
        "llama", {"rope_parameters": parameters, "max_position_embeddings": trained if kind == "dynamic" else 64}
    )
    pairs = random_pairs(10, seed=6)
    plain = []
    for pair in pairs:
        # a fresh copy for each side: a longer sequence before it leaves its frequencies behind
        first = [plain_logps(copy.deepcopy(model), each) for each in (pair, swapped(pair))]
        plain.append([sums[0] / counts[0] for sums, counts in first])
    scorer, notes = settled(model)
    assert scorer.layout_name == expected
    assert not notes if expected == "packed" else "rotary positions change with a sequence's length" in notes[0]
    with torch.no_grad():
        for _ in range(2):
            found = scorer(lay_out(pairs, expected)).logp_mean.double()
            assert (found - torch.tensor(plain)).abs().max() < 1e-5
            scorer(lay_out(pairs[3:4], expected))


RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "head_dim": None, "block_multiple_of": 8},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
    },
    "bamba": {
        "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
        "mamba_expand": 2, "head_dim": None,
    },
}  # fmt: skip
# Their code computes states in float32 whatever the model's precision, so the float64 loop has that noise too.
STATES = 3e-5


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_family_is_padded_where_its_code_keeps_no_boundaries(family: str) -> None:
    model = tiny(family, RECURRENT[family])
    scorer, notes = settled(model)
    assert scorer.layout_name == "padded" and "carry chosen into rejected" in notes[0]
    with pytest.raises(ConfigError, match="can't keep packed sequences apart without"):
        settled(model, "sequences")
    check_layout(model, "padded", within=STATES)


def by_sequence(run: Any, time: int) -> Any:
    """A kernel that keeps sequences apart: `run` on each; `time` is the axis of its inputs and outputs that counts tokens."""

    def apart(first: torch.Tensor, *args: Any, **options: Any) -> Any:
        starts, boundaries = options.pop("cu_seq_lens_q", None), options.pop("cu_seqlens", None)
        starts = starts if boundaries is None else boundaries
        for name in ("seq_idx", "cu_seq_lens_k"):
            options.pop(name, None)
        if starts is None:
            return run(first, *args, **options)
        length, parts = first.shape[time], []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            cut = [cut_to(item, length, start, end) for item in (first, *args)]
            parts.append(run(*cut, **{name: cut_to(item, length, start, end) for name, item in options.items()}))
        if isinstance(parts[0], tuple):
            return torch.cat([part[0] for part in parts], time), None
        return torch.cat(parts, time)

    return apart


def cut_to(item: Any, length: int, start: int, end: int) -> Any:
    """The tokens from start to end of whatever has an axis of `length` tokens."""
    if not isinstance(item, torch.Tensor) or length not in item.shape[1:]:
        return item
    return item.narrow(1 + list(item.shape[1:]).index(length), start, end - start)


KERNELS = {
    "lfm2": {"causal_conv1d_fn": 2},
    "qwen3_next": {"causal_conv1d_fn": 2, "torch_chunk_gated_delta_rule": 1},
    "bamba": {"causal_conv1d_fn": 2, "mamba2_chunk_scan": 1},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_family_is_packed_by_sequences_where_its_code_keeps_them_apart(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that take boundaries, here stand-ins that run transformers' own code on each sequence."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name, time in KERNELS[family].items():
        monkeypatch.setattr(module, name, by_sequence(getattr(module, name), time))
    check_layout(tiny(family, RECURRENT[family]), "sequences", within=STATES)


def test_a_full_memory_of_the_cpu_is_the_error_that_a_gpus_is() -> None:
    """So that batches are halved, and a training step says what to lower."""
    model = tiny("llama", {})
    scorer = Scorer(model, "float32")
    model.model.layers[1].mlp.forward = lambda hidden: torch.empty(10**15)
    with pytest.raises(torch.OutOfMemoryError, match="allocate"):
        scorer(lay_out(random_pairs(2)))
