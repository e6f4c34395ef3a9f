"""Which layout of batches a model can be scored in."""

import numpy as np
import torch

from minicache.cache.identity import TOLERANCE
from minicache.errors import ConfigError
from minicache.options.catalog import LAYOUTS
from minicache.pairs import PairTable
from minicache.scoring.attention import use_spans, why_not_branching
from minicache.scoring.batch import layout_named
from minicache.scoring.handshake import SAMPLE
from minicache.scoring.scorer import Scorer
from minicache.trackers import Tracker


def settle_layout(scorer: Scorer, table: PairTable, asked: str, device: torch.device, tracker: Tracker) -> None:
    """Give the scorer the layout asked for, or of `auto` the first that gives this model the values of `padded`.

    Why a layout before it was not taken is noted.

    Raises:
        ConfigError: the layout asked for by name cannot be used with this model.
    """
    problems: list[str] = []
    for name in LAYOUTS if asked == "auto" else (asked,):
        problem = _problem(scorer, table, name, device)
        if problem is None:
            scorer.layout_name = name
            for line in problems[:1]:
                tracker.note(line)
            return
        problems.append(f"layout {name} is not used: {problem}")
    raise ConfigError(f"--layout {asked}: cannot be used with this model: {problem}; expected auto or padded")


def _problem(scorer: Scorer, table: PairTable, layout: str, device: torch.device) -> str | None:
    """Why this model cannot be scored in this layout, by its configuration or by a few short pairs; None if it can."""
    if layout == "padded":
        return None
    if LAYOUTS[layout].branches and (reason := why_not_branching(scorer.model)):
        return reason
    sample = np.argsort(table.lengths.sum(1), kind="stable")[:SAMPLE]
    try:
        use_spans(scorer.model)
        batches = [layout_named(name).make(table, sample).to(device) for name in ("padded", layout)]
        with torch.no_grad():
            expected, found = map(scorer, batches)
        if device.type == "cuda" and any(parameter.requires_grad for parameter in scorer.parameters()):
            scorer(batches[1]).logp_sum.sum().backward()  # FlexAttention compiles that apart, and not for every model
            scorer.zero_grad(set_to_none=True)
    except Exception as error:  # whatever a model's own code or a compiler makes of it
        return " ".join(str(error).split())[:160] or type(error).__name__
    worst = float((expected.logp_mean - found.logp_mean).abs().max())
    return None if worst <= TOLERANCE[scorer.dtype] else f"it gives other logprobs, by up to {worst:.2g} nats a token"
