"""The value of --loss: one preference loss, or several with weights; and whether it begins at ln 2."""

import math
from collections.abc import Mapping

from minicache.errors import ConfigError
from minicache.options.catalog import LOSSES


def parse_loss(text: str) -> dict[str, float]:
    """Name -> weight of each loss in `sigmoid` or `sigmoid:0.8,bco_pair:0.2`. A loss without a weight has weight 1.

    Raises:
        ConfigError: a name is unknown or appears twice, or a weight is not a number above 0.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition(":"))
        if name not in LOSSES:
            raise ConfigError(
                f"--loss: expected {', '.join(LOSSES)}, or several like sigmoid:0.8,hinge:0.2; got {name!r}"
            )
        if name in weights:
            raise ConfigError(f"--loss: {name} is named twice; give it one weight")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ConfigError(f"--loss: the weight of {name} must be a number, got {weight!r}") from None
        if not 0 < weights[name] < math.inf:
            raise ConfigError(f"--loss: the weight of {name} must be above 0, got {weight}")
    return weights


def starts_at_ln_2(settings: Mapping[str, object]) -> bool:
    """Whether the loss is ln 2 where policy and reference agree. settings: by their names in run.json."""
    if settings.get("sft_weight") or settings.get("wpo") or settings.get("init_from"):
        return False
    try:
        losses = parse_loss(str(settings.get("loss")))
    # the loss of a later version is unknown
    except ConfigError:
        return False
    return math.isclose(sum(losses.values()), 1) and all(LOSSES[name].from_ln_2 for name in losses)
