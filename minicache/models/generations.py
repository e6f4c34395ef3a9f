"""The three generations of MiniMind: what a file of each does not carry, and its tensors under transformers' names, both ways.

A dense layer keeps its tensors one to one. The experts of a layer, a tensor each in the file, lie stacked in transformers, and the
shared experts, which all see every token, side by side as one wide one.
Source: jingyaogong/minimind, model/model.py (2504), model/model_minimind.py (2510, 3).
"""

import re
from dataclasses import dataclass

import torch

from minicache.errors import ModelError

State = dict[str, torch.Tensor]
NOT_WEIGHTS = ("freqs_cos", "freqs_sin", "pos_cis", "attention.mask")  # tables some versions saved; computed anew

MIXTURES_SINCE = (5, 14)  # of transformers


@dataclass(frozen=True)
class Experts:
    """Where a transformers family keeps a mixture-of-experts layer: router, stacked experts, and the wide shared one."""

    family: str
    router: str
    stacked: str
    shared: str | None = None


@dataclass(frozen=True)
class Generation:
    """What the file of a generation does not carry, and how its keys read.

    marker: a key that only this generation has. balance: coefficient of the load-balancing loss.
    words: (as in transformers' dense models, as in the file), applied in order.
    interleaved: rotary positions turn neighbouring dimensions, not the two halves. head_norms: q and k are normalised.
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
    "3", "model.layers.0.self_attn.q_norm.weight", "qwen3", QWEN3_MOE, 8, 4, 1e-6, 1, 5e-4, head_norms=True
)
MID = Generation("2510", "model.layers.0.self_attn.q_proj.weight", "llama", GRANITE, 8, 2, 1e-5, 2, 0.1)
FIRST = Generation(
    "2504", "layers.0.attention.wq.weight", "llama", GRANITE, 8, 2, 1e-5, 2, 0.1, WORDS_2504, interleaved=True
)
GENERATIONS = {
    generation.name: generation for generation in (THREE, MID, FIRST)
}  # the newest first: its marker decides


def require_mixtures() -> None:
    """Older versions keep Granite's experts under other names, and some give Qwen3-MoE's scores where its logits should be.

    Raises:
        ModelError: transformers is too old for a mixture of experts of MiniMind's.
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
    """Layers, routed experts a layer (0: dense) and shared experts a layer."""

    layers: int
    experts: int
    shared: int


def count(state: State, generation: Generation) -> Counts:
    """What the keys of a file say, complete or not."""
    gate = state.get(_file_key("model.layers.0.mlp.gate.weight", generation))
    experts = max(len(gate) if gate is not None else 0, _highest(r"\.experts\.(\d+)\.", state))
    shared = _highest(r"\.shared_experts\.(\d+)\.", state) or int(any(".shared_experts." in key for key in state))
    return Counts(_highest(r"(?:^|\.)layers\.(\d+)\.", state), experts, shared)


def file_keys(generation: Generation, counts: Counts) -> dict[str, str]:
    """Every tensor of a checkpoint: its name in the manner of transformers' dense models -> its key in the file."""
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
    """`plain` with the rows of q and k in the order the other side's rotary positions need; heads: of "q" and of "k"."""
    if not generation.interleaved:
        return plain
    return {name: _turned_rows(name, weight, heads, back) for name, weight in plain.items()}


def _turned_rows(name: str, weight: torch.Tensor, heads: dict[str, int], back: bool) -> torch.Tensor:
    """A head's rows 0 1 2 3 … as 0 2 … 1 3 …: rotating halves then does what rotating pairs did before. `back` undoes it."""
    found = re.search(r"self_attn\.([qk])_proj", name)
    if not found:
        return weight
    rows, columns = weight.shape
    half = rows // heads[found[1]] // 2
    inner = (2, half) if back else (half, 2)
    return weight.view(-1, *inner, columns).transpose(1, 2).reshape(rows, columns)


def stack(plain: State, experts: Experts, counts: Counts) -> State:
    """Tensors of a mixture of experts, one an expert, as transformers keeps them."""
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
    """What `stack` was given, from what it gave."""
    plain = {name: weight for name, weight in state.items() if ".mlp." not in name and ".block_sparse_moe." not in name}
    plain = {name: weight for name, weight in plain.items() if not experts.shared or experts.shared not in name}
    layers, shared = _highest(r"(?:^|\.)layers\.(\d+)\.", state), 0
    for layer in range(layers):
        here, mlp = f"model.layers.{layer}.", f"model.layers.{layer}.mlp."
        plain[mlp + "gate.weight"] = state[here + experts.router]
        gate_up, down = state[f"{here}{experts.stacked}gate_up_proj"], state[f"{here}{experts.stacked}down_proj"]
        width = down.shape[2]
        for index, both in enumerate(gate_up):
            plain |= _named(f"{mlp}experts.{index}.", both[:width], both[width:], down[index])
        wide = state.get(f"{here}{experts.shared}input_linear.weight")  # (2 x shared x width, hidden)
        if wide is not None:
            downs = state[f"{here}{experts.shared}output_linear.weight"].split(width, 1)
            gates, ups = (half.split(width) for half in wide.chunk(2))
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
