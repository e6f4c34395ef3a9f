"""Recipes: the defaults of MiniMind's own scripts, for both stages."""

from typing import Any

from minicache.errors import ConfigError

# The defaults of each generation's train_dpo.py, for both stages. Its weight decay is the default of torch's AdamW.
# Source: github.com/jingyaogong/minimind.
_MINIMIND: dict[str, Any] = {
    "loss_on": "assistant",
    "max_length": 1024,
    "epochs": 1.0,
    "batch_size": 4,
    "lr": 4e-8,
    "warmup": 0.0,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "minimind-2504": {**_MINIMIND, "logps": "mean", "beta": 0.1, "schedule": "minimind-2504",
                      "lr": 1e-8, "batch_size": 8, "epochs": 2.0},
    "minimind-2510": {**_MINIMIND, "logps": "mean", "beta": 0.1, "schedule": "minimind-2510"},
    "minimind-3": {**_MINIMIND, "logps": "sum", "beta": 0.15, "schedule": "minimind-3", "think": "drop"},
}  # fmt: skip


def recipe(name: str | None) -> dict[str, Any]:
    """The options of a recipe by name, for both stages; empty for None.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name is not None and name not in RECIPES:
        raise ConfigError(f"--recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name] if name else {}
