"""The three generations of MiniMind: the settings that their files lack, and the names of tensors there and in transformers.

The tensors of a dense layer correspond one to one. The routed experts of a layer are a tensor each in the file and one stacked
tensor in transformers; the shared experts, which all see every token, are concatenated into one wide expert.
Source: jingyaogong/minimind, model/model.py (2504), model/model_minimind.py (2510, 3).
"""

import re
from dataclasses import dataclass, replace

import torch

from minicache.errors import ModelError

State = dict[str, torch.Tensor]
# Tables that some versions saved and that are computed anew.
NOT_WEIGHTS = ("freqs_cos", "freqs_sin", "pos_cis", "attention.mask")
# A key with a longer number is that of no layer, and left over.
LAYER = r"(?:^|\.)layers\.(\d{1,9})\."
# The first version of transformers whose mixtures of experts can be used.
MIXTURES_SINCE = (5, 14)


@dataclass(frozen=True)
class Experts:
    """Names in a mixture-of-experts layer of a transformers family: router, stacked experts, and the wide shared expert."""

    family: str
    router: str
    stacked: str
    shared: str | None = None


@dataclass(frozen=True)
class Generation:
    """The settings that a file of this generation lacks, and the form of its keys.

    marker: a key that only this generation has. dense: the transformers family of its dense models.
    heads, kv_heads, rms_eps, experts_per_token: defaults. balance: weight of the load-balancing loss in the newest train_dpo.py.
    words: (part of a name in transformers' dense models, the same part in the file), replaced in order.
    interleaved: rotary positions rotate neighbouring dimensions, not the two halves. head_norms: q and k are normalised.
    """

    name: str
    marker: str
    dense: str
    experts: Experts
    heads: int
    kv_heads: int
    rms_eps: float
    experts_per_token: int
    balance: float
    words: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False
    head_norms: bool = False


WORDS_2504 = (
    ("model.embed_tokens.", "tok_embeddings."),
    ("lm_head.", "output."),
    ("model.", ""),
    *((f"self_attn.{part}_proj.", f"attention.w{part}.") for part in "qkvo"),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("mlp.shared_experts.0.", "feed_forward.shared_experts."),
    ("mlp.", "feed_forward."),
    ("gate_proj.", "w1."),
    ("down_proj.", "w2."),
    ("up_proj.", "w3."),
)
GRANITE = Experts("granitemoeshared", "block_sparse_moe.router.weight", "block_sparse_moe.experts.", "shared_mlp.")
QWEN3_MOE = Experts("qwen3_moe", "mlp.gate.weight", "mlp.experts.")
THREE = Generation(
    name="3",
    marker="model.layers.0.self_attn.q_norm.weight",
    dense="qwen3",
    experts=QWEN3_MOE,
    heads=8,
    kv_heads=4,
    rms_eps=1e-6,
    experts_per_token=1,
    balance=5e-4,
    head_norms=True,
)
MID = Generation(
    name="2510",
    marker="model.layers.0.self_attn.q_proj.weight",
    dense="llama",
    experts=GRANITE,
    heads=8,
    kv_heads=2,
    rms_eps=1e-5,
    experts_per_token=2,
    balance=0.01,
)
# Its train_dpo.py adds no such loss.
FIRST = replace(
    MID, name="2504", marker="layers.0.attention.wq.weight", words=WORDS_2504, interleaved=True, balance=0.0
)
# The newest first: files of generation 3 also have the marker of 2510.
GENERATIONS = {generation.name: generation for generation in (THREE, MID, FIRST)}


def require_mixtures() -> None:
    """Require a transformers version that computes MiniMind's mixtures of experts.

    Older versions keep Granite's experts under other names, and some give Qwen3-MoE's scores in place of its logits.

    Raises:
        ModelError: the installed version is older than MIXTURES_SINCE.
    """
    from transformers import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < MIXTURES_SINCE:
        needed = ".".join(map(str, MIXTURES_SINCE))
        raise ModelError(
            f"a MiniMind mixture of experts needs transformers {needed} or newer, and {__version__} is installed: "
            f"pip install 'transformers>={needed}'"
        )


@dataclass(frozen=True)
class Counts:
    """Numbers of layers, of routed experts per layer (0: dense) and of shared experts per layer."""

    layers: int
    experts: int
    shared: int


def count(state: State, generation: Generation) -> Counts:
    """The counts that follow from the keys of a file, which may be incomplete.

    Raises:
        ValueError: they would be of many more tensors than the file has.
    """
    gate = state.get(_file_key("model.layers.0.mlp.gate.weight", generation))
    experts = max(len(gate) if gate is not None else 0, _highest(r"\.experts\.(\d{1,9})\.", state))
    shared = _highest(r"\.shared_experts\.(\d{1,9})\.", state) or int(any(".shared_experts." in key for key in state))
    counts = Counts(_highest(LAYER, state), experts, shared)
    # each expert of a layer has three tensors
    if counts.layers * max(experts + shared, 1) > len(state):
        per_layer = f" of {experts + shared:,} experts" if experts + shared else ""
        raise ValueError(f"its keys number {counts.layers:,} layers{per_layer}, and it has {len(state):,} tensors")
    return counts


def file_keys(generation: Generation, counts: Counts) -> dict[str, str]:
    """For every tensor of a checkpoint, its name in the form of transformers' dense models -> its key in the file."""
    blocks = [f"experts.{index}." for index in range(counts.experts)] or [""]
    blocks += [f"shared_experts.{index}." for index in range(counts.shared)]
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + ["input_layernorm", "post_attention_layernorm"]
    parts += ["self_attn.q_norm", "self_attn.k_norm"] if generation.head_norms else []
    parts += [f"mlp.{block}{part}_proj" for block in blocks for part in ("gate", "up", "down")]
    parts += ["mlp.gate"] if counts.experts else []
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{layer}.{part}.weight" for layer in range(counts.layers) for part in parts]
    return {name: _file_key(name, generation) for name in names}


def turned(plain: State, generation: Generation, heads: dict[str, int], back: bool) -> State:
    """`plain` with the rows of q and k in transformers' order of rotary positions; `back`: in the generation's own order.

    heads: numbers of heads of "q" and "k".
    """
    if not generation.interleaved:
        return plain
    return {name: _turned_rows(name, weight, heads, back) for name, weight in plain.items()}


def _turned_rows(name: str, weight: torch.Tensor, heads: dict[str, int], back: bool) -> torch.Tensor:
    """The rows 0 1 2 3 … of each head as 0 2 … 1 3 …, so that rotating halves does what rotating pairs did; `back` undoes it."""
    found = re.search(r"self_attn\.([qk])_proj", name)
    if not found:
        return weight
    rows, columns = weight.shape
    half = rows // heads[found[1]] // 2
    inner = (2, half) if back else (half, 2)
    return weight.view(-1, *inner, columns).transpose(1, 2).reshape(rows, columns)


def stack(plain: State, experts: Experts, counts: Counts) -> State:
    """The tensors of a mixture of experts, one for each expert in `plain`, as transformers stacks them."""
    state = {name: weight for name, weight in plain.items() if ".mlp." not in name}
    for layer in range(counts.layers):
        here, mlp = f"model.layers.{layer}.", f"model.layers.{layer}.mlp."
        state[here + experts.router] = plain[mlp + "gate.weight"]
        routed = [_expert(plain, f"{mlp}experts.{index}.") for index in range(counts.experts)]
        state[f"{here}{experts.stacked}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in routed])
        state[f"{here}{experts.stacked}down_proj"] = torch.stack([down for *_, down in routed])
        if experts.shared and counts.shared:
            side = [_expert(plain, f"{mlp}shared_experts.{index}.") for index in range(counts.shared)]
            gates, ups, downs = zip(*side, strict=True)
            state[f"{here}{experts.shared}input_linear.weight"] = torch.cat([*gates, *ups])
            state[f"{here}{experts.shared}output_linear.weight"] = torch.cat(downs, 1)
    return state


def unstack(state: State, experts: Experts) -> tuple[State, Counts]:
    """The inverse of `stack`: one tensor for each expert, and the counts."""
    plain = {name: weight for name, weight in state.items() if ".mlp." not in name and ".block_sparse_moe." not in name}
    plain = {name: weight for name, weight in plain.items() if not experts.shared or experts.shared not in name}
    layers, shared = _highest(LAYER, state), 0
    for layer in range(layers):
        here, mlp = f"model.layers.{layer}.", f"model.layers.{layer}.mlp."
        plain[mlp + "gate.weight"] = state[here + experts.router]
        gate_up, down = state[f"{here}{experts.stacked}gate_up_proj"], state[f"{here}{experts.stacked}down_proj"]
        width = down.shape[2]
        for index, expert in enumerate(gate_up):
            plain |= _named(f"{mlp}experts.{index}.", expert[:width], expert[width:], down[index])
        # (2 x shared x width, hidden)
        wide = state.get(f"{here}{experts.shared}input_linear.weight")
        if wide is not None:
            downs = torch.split(state[f"{here}{experts.shared}output_linear.weight"], width, 1)
            gates, ups = (torch.split(half, width) for half in wide.chunk(2))
            shared = len(gates)
            for index, parts in enumerate(zip(gates, ups, downs, strict=True)):
                plain |= _named(f"{mlp}shared_experts.{index}.", *parts)
    return plain, Counts(layers, len(gate_up), shared)


def _expert(plain: State, prefix: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return plain[prefix + "gate_proj.weight"], plain[prefix + "up_proj.weight"], plain[prefix + "down_proj.weight"]


def _named(prefix: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> State:
    return {f"{prefix}{part}_proj.weight": weight for part, weight in (("gate", gate), ("up", up), ("down", down))}


def _file_key(name: str, generation: Generation) -> str:
    for ours, theirs in generation.words:
        name = name.replace(ours, theirs)
    return name


def _highest(pattern: str, state: State) -> int:
    """One more than the highest number that `pattern` finds in the keys; 0 where it finds none."""
    return 1 + max((int(found[1]) for key in state if (found := re.search(pattern, key))), default=-1)
