"""config.json of a saved model, which transformers 5 writes in words of its own: as transformers 4, and vLLM on it, reads it too.

Without theirs, transformers 4 takes its defaults, a rotary base of 10000 among them, and says nothing. Every word here is one that
transformers 5 reads back to the config that it wrote.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

# Model type -> the names of the rotary base and of the share of a head that is turned, where transformers 4 has its own.
BASE_AND_SHARE = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
# Of families whose kinds of layers turn by bases of their own: kind of layer -> the name of its base.
_GEMMA = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
BASES_BY_LAYER = {
    "gemma3_text": _GEMMA,
    "gemma3n_text": _GEMMA,
    "modernbert-decoder": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
    "olmo3": {"full_attention": "rope_theta"},
}
# Families whose classes refuse a scaling of other entries than these, and so one that no transformers 4 has written.
ENTRIES = {
    **dict.fromkeys(("olmo", "olmo2"), ("type", "factor")),
    **dict.fromkeys(("phi3", "phi4_multimodal"), ("type", "short_factor", "long_factor")),
}
# Families that turn whole heads where no share is named. transformers 5 would keep the entry as a setting beside the others.
WHOLE = {"phi3", "phi4_multimodal"}
# Model type -> the name in transformers 5 of a setting, and that in transformers 4.
RENAMED = {"qwen3_moe": ("num_local_experts", "num_experts")}
# What transformers 5 calls kinds of layers that the class in transformers 4 refuses by that name.
LAYERS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
OF_ROPE, KINDS = ("rope_theta", "partial_rotary_factor"), {"rope_type", "type"}


def complete(file: Path, model: nn.Module) -> None:
    """Add to the config.json of a saved model what other versions of transformers read; an adapter has none."""
    if not file.is_file():
        return
    settings = json.loads(file.read_text(encoding="utf-8"), object_hook=_float)
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    in_several = len({each.dtype for each in model.parameters() if each.is_floating_point()}) > 1
    for part in parts:
        kind = str(part.get("model_type"))
        # transformers loads all weights in the precision that the config names, and would round those of a wider one
        if in_several:
            part |= {name: "float32" for name in ("dtype", "torch_dtype") if name in part}
        # before 4.56
        if isinstance(part.get("dtype"), str):
            part["torch_dtype"] = part["dtype"]
        name, earlier = RENAMED.get(kind, ("", ""))
        if name in part:
            part[earlier] = part[name]
        if kind in LAYERS and part.get("layer_types"):
            part["layer_types"] = [LAYERS[kind].get(each, each) for each in part["layer_types"]]
        # in place of what the config may say already: with a scaling, transformers 5 reads these alone
        part |= _earlier_rope(part, kind)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def _float(entries: dict[str, Any]) -> Any:
    """The number that transformers 5 writes as an object, infinity as in Mamba 2's limits of time, as Python's JSON has it."""
    return float(entries["__float__"]) if entries.keys() == {"__float__"} else entries


def _earlier_rope(part: dict[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    """What a part of a config says by `rope_parameters`, in the entries of transformers 4."""
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    base, share = BASE_AND_SHARE.get(kind, OF_ROPE)
    if any(isinstance(value, dict) for value in rope.values()):
        bases = BASES_BY_LAYER.get(kind, {})
        said = {name: (rope.get(layer) or {}).get("rope_theta") for layer, name in bases.items()}
        yield from ((name, theta) for name, theta in said.items() if theta is not None)
        # the other kinds of layers are not scaled
        rope = rope.get("full_attention") or {} if base in bases.values() else {}
    elif "rope_theta" in rope:
        yield base, rope["rope_theta"]
    if "partial_rotary_factor" in rope and kind not in WHOLE:
        yield share, rope["partial_rotary_factor"]
    scaling = {name: value for name, value in rope.items() if name not in OF_ROPE}
    if rope.get("rope_type") != "default" and kind in ENTRIES and "type" in rope:
        scaling = {name: scaling[name] for name in ENTRIES[kind] if name in scaling}
    if scaling.keys() - KINDS:
        yield "rope_scaling", scaling
