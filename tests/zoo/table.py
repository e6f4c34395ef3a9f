"""docs/models.md from what check.py found."""

from typing import Any

Found = dict[str, Any]


def line(found: Found) -> str:
    parts = []
    for name in ("build", "cache", "plain", "train", "lora", "shards"):
        part = found.get(name)
        if part is None: continue
        if "failed" in part:
            parts.append(f"{name} FAILED{' raw' if part['raw'] else ''}: {part['failed'][:160]}")
        elif name == "cache":
            parts.append(f"{part['layout']} {part.get('off', -1):.1e} of {part.get('spread',-1):.2f}")
        elif name == "train":
            parts.append(f"train {part['layout']} {part.get('losses_off', -1):.1e} {part.get('norms_off', -1):.1e} policy {part.get('policy_off', -1):.1e} {part.get('keys_off') or ''}")
        elif name == "lora":
            parts.append(f"lora {part['merged_off']:.1e} of {part['moved']:.1e}")
        elif name == "shards":
            parts.append(f"shards {part['layers']} {part['off']:.1e}")
    return f"{found['name']} ({found['seconds']} s): " + "; ".join(parts)


def sums(results: list[Found]) -> str:
    return f"{len(results)} families"


def page(results: list[Found]) -> str:
    return ""
