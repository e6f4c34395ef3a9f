"""MiniMind checkpoints (.pth): a plain state dict of one of three generations, which its keys identify.

Each generation computes what a transformers class computes.

- Dense: 2504 and 2510 are Llama (2504 rotates interleaved pairs, which is Llama with reordered rows of q and k); 3 is Qwen3.
- Mixtures of experts: 2504 and 2510 are GraniteMoeShared with neutral multipliers (the softmax over the top logits equals the
  normalised top of the softmax); 3 is Qwen3-MoE.

A setting that the file lacks has the generation's default, unless the model's name sets it: `model.pth:heads=16,kv_heads=8`.
"""

import math
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.errors import ModelError
from minicache.models.described import without_weights
from minicache.models.generations import (
    GENERATIONS,
    NOT_WEIGHTS,
    Counts,
    Generation,
    State,
    count,
    file_keys,
    require_mixtures,
    stack,
    turned,
)
from minicache.models.pth_file import read_pth
from minicache.text import one_line

ROPE_THETA, POSITIONS = 1e6, 32768


@dataclass(frozen=True)
class Options:
    """The settings in a model's name, `model.pth:heads=16,rope_theta=1e4`. None: the generation's default."""

    heads: int | None = None
    kv_heads: int | None = None
    experts_per_token: int | None = None
    rms_eps: float | None = None
    rope_theta: float | None = None


WHOLE = ("heads", "kv_heads", "experts_per_token")


@dataclass(frozen=True)
class Heads:
    """Numbers of query heads and of key and value heads, and the width of a head."""

    q: int
    kv: int
    size: int


def load(path: Path, options: str = "") -> tuple[nn.Module, tuple[str, ...]]:
    """The transformers model that computes the same as a MiniMind checkpoint, and lines on what of the file was not used.

    The model's config names the generation in `minimind`. options: the text behind the colon in the model's name, see `Options`.

    Raises:
        ModelError: the file is no state dict of tensors, is of no known generation, is not whole, or the options do not fit it.
    """
    named, file = _parse(path, options), read_pth(path)
    state = file.state
    generation = next((item for item in GENERATIONS.values() if item.marker in state), None)
    if generation is None:
        known = ", ".join(f"MiniMind {name}" for name in reversed(GENERATIONS))
        raise ModelError(
            f"{path}: expected a checkpoint of {known}; found keys like {', '.join(list(state)[:3]) or 'none'}"
        )
    kind = f"MiniMind {generation.name}"
    try:
        counts, tied = count(state, generation), _tie(state, path, generation)
        if counts.experts:
            require_mixtures()
        kind = _kind(generation, counts)
        plain = _plain(state, path, generation, counts)
        heads = _heads(plain, path, generation, named)
        plain = turned(plain, generation, {"q": heads.q, "k": heads.kv}, back=False)
        config = _config(plain, generation, counts, heads) | _chosen(path, generation, counts, named)
        model = _build(stack(plain, generation.experts, counts) if counts.experts else plain, config)
        return model, (*file.notes, *tied)
    except ModelError:
        raise
    # transformers' checks of a config raise classes of their own
    except Exception as error:
        raise ModelError(f"{path}: not a whole {kind} checkpoint: {one_line(error, 300)}") from error


def _parse(path: Path, options: str) -> Options:
    values: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in options.split(","))):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in [field.name for field in fields(Options)] or name in values:
            known = ", ".join(field.name for field in fields(Options))
            raise ModelError(
                f"{path}: {part!r} behind the colon: expected each of {known} at most once, as name=number"
            )
        try:
            values[name] = int(text) if name in WHOLE else float(text)
        except ValueError:
            values[name] = math.nan
        if not 0 < values[name] < math.inf:
            kind = "a whole number above 0" if name in WHOLE else "a number above 0"
            raise ModelError(f"{path}: {part!r} behind the colon: expected {kind}, as in {name}={_example(name)}")
    return Options(**values)  # type: ignore[arg-type]


def _example(name: str) -> str:
    return {"heads": "8", "kv_heads": "2", "experts_per_token": "2", "rms_eps": "1e-5", "rope_theta": "1e6"}[name]


def _tie(state: State, path: Path, generation: Generation) -> tuple[str, ...]:
    """Add the head or the embedding where a file holds one of the two, and say so.

    In all three generations they are one tensor; 3 can have two, of which its state dict holds both.
    """
    keys = file_keys(generation, Counts(0, 0, 0))
    pair = [keys[name] for name in ("model.embed_tokens.weight", "lm_head.weight")]
    missing = [key for key in pair if key not in state]
    if len(missing) != 1:
        return ()
    (kept,) = (key for key in pair if key in state)
    state[missing[0]] = state[kept]
    return (f"{path}: {missing[0]} is not in the file; MiniMind ties it to {kept}, which is used",)


def _plain(state: State, path: Path, generation: Generation, counts: Counts) -> State:
    """The file's tensors under the names of transformers' dense models.

    Raises:
        ModelError: a tensor is missing or unknown.
    """
    keys = file_keys(generation, counts)
    missing = [key for key in keys.values() if key not in state]
    strange = [key for key in state.keys() - set(keys.values()) if not key.endswith(NOT_WEIGHTS)]
    for what, wrong in (("missing", missing), ("not part of one", sorted(strange))):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            kind = _kind(generation, counts)
            raise ModelError(
                f"{path}: not a whole {kind} checkpoint of {counts.layers} layers: {what}: {wrong[0]}{more}"
            )
    return {name: state[key] for name, key in keys.items()}


def _kind(generation: Generation, counts: Counts) -> str:
    return f"{'mixture-of-experts' if counts.experts else 'dense'} MiniMind {generation.name}"


def _heads(plain: State, path: Path, generation: Generation, named: Options) -> Heads:
    """The heads, from the rows of q and k and one more number: the width of a head's norm, the name's option, or the default.

    Raises:
        ModelError: these numbers do not fit each other.
    """
    rows, kv_rows = (plain[f"model.layers.0.self_attn.{part}_proj.weight"].shape[0] for part in "qk")
    norm = plain.get("model.layers.0.self_attn.q_norm.weight")  # (head size,)
    heads = named.heads or (rows // len(norm) if norm is not None else None)
    if heads is None:
        heads = rows * named.kv_heads // kv_rows if named.kv_heads else generation.heads
    size = rows // heads
    kv = kv_rows // size if size else 0
    fits = kv and rows == heads * size and kv_rows == kv * size and size % 2 == 0 and heads % kv == 0
    fits = fits and (norm is None or len(norm) == size) and named.kv_heads in (None, kv)
    if fits and (norm is not None or named.heads or named.kv_heads or kv == generation.kv_heads):
        return Heads(heads, kv, size)
    asked = f"{named.heads or heads} heads and {named.kv_heads or generation.kv_heads} kv heads"
    origin = "as named" if named.heads or named.kv_heads else "the default"
    has = f"q has {rows} rows, k {kv_rows}" + (f", a head {len(norm)}" if norm is not None else "")
    raise ModelError(
        f"{path}: {has}: {asked} ({origin}) do not fit; name those that do: {path.name}:heads=N,kv_heads=M"
    )


def _chosen(path: Path, generation: Generation, counts: Counts, named: Options) -> dict[str, Any]:
    """The settings of the config that do not follow from the tensors: from the model's name, or the default.

    Raises:
        ModelError: the number of experts per token does not fit the model.
    """
    chosen: dict[str, Any] = {
        "rms_norm_eps": named.rms_eps or generation.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": named.rope_theta or ROPE_THETA},
    }
    if not counts.experts:
        if named.experts_per_token:
            raise ModelError(f"{path}: experts_per_token={named.experts_per_token}: a dense model has no experts")
        return chosen
    active = named.experts_per_token or generation.experts_per_token
    # 2504 and 2510 weight a single expert by its softmax score, which GraniteMoeShared does not.
    least = 2 if generation.experts.shared else 1
    if not least <= active <= counts.experts:
        raise ModelError(f"{path}: experts_per_token={active}: expected {least} to {counts.experts}, as many as it has")
    return chosen | {"num_experts_per_tok": active}


def _config(plain: State, generation: Generation, counts: Counts, heads: Heads) -> dict[str, Any]:
    """The settings of the config that follow from the tensors."""
    embedding = plain["model.embed_tokens.weight"]
    vocabulary, hidden = embedding.shape
    width = plain[f"model.layers.0.mlp.{'experts.0.' if counts.experts else ''}gate_proj.weight"].shape[0]
    config = {
        "model_type": generation.experts.family if counts.experts else generation.dense,
        "minimind": generation.name,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": counts.layers,
        "num_attention_heads": heads.q,
        "num_key_value_heads": heads.kv,
        "head_dim": heads.size,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": torch.equal(embedding, plain["lm_head.weight"]),
        # the smallest type in which no weight loses a digit
        "dtype": reduce(torch.promote_types, (weight.dtype for weight in plain.values())),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if not counts.experts:
        return config
    config["router_aux_loss_coef"] = generation.balance
    if generation.experts.shared:
        shared = {"num_local_experts": counts.experts, "shared_intermediate_size": counts.shared * width}
        return config | shared | {"attention_multiplier": heads.size**-0.5}
    return config | {"num_experts": counts.experts, "moe_intermediate_size": width, "norm_topk_prob": True}


def _build(state: State, settings: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    family: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(**settings)
    # A few widths make the config: memory is taken for weights of these shapes only if the file has all of them.
    due = without_weights(config, attn_implementation="sdpa", dtype=config.dtype).state_dict()
    for name, weight in state.items():
        if name in due and due[name].shape != weight.shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}, expected {tuple(due[name].shape)} beside the others")
    model: nn.Module = family.from_config(config, attn_implementation="sdpa", dtype=config.dtype)
    model.load_state_dict(state)
    return model
