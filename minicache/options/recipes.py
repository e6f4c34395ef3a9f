"""Recipes: the options of published scripts and results, for both stages, with their sources.

An entry holds what differs from this program's own defaults or what its source states. Where a source says nothing, nothing stands
here. To add a recipe, add an entry; help, checks and `minidpo recipes` follow from it.
"""

from dataclasses import dataclass
from typing import Any

from minicache.errors import ConfigError
from minicache.options.declare import check_options, option


@dataclass(frozen=True)
class Recipe:
    """Options of both stages by name. about: whose they are, and for which models. source: where they are published."""

    about: str
    source: str
    options: dict[str, Any]


def _minimind(about: str, **options: Any) -> Recipe:
    """The defaults of a train_dpo.py: what all share, and these. Weight decay is that of torch's AdamW, on all weights."""
    shared = {
        "loss_on": "assistant",
        "max_length": 1024,
        "logps": "mean",
        "beta": 0.1,
        "batch_size": 4,
        "warmup": 0.0,
        "weight_decay": 0.01,
        "decay_norms": True,
        "max_grad_norm": 1.0,
    }
    return Recipe(about, "github.com/jingyaogong/minimind, trainer/train_dpo.py", {**shared, **options})


def _published(about: str, source: str, **options: Any) -> Recipe:
    """What the published recipes share, and these. Their clipping is the default of transformers and of accelerate."""
    shared = {
        "loss_on": "response",
        "batch_size": 128,
        "epochs": 1.0,
        "warmup": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    return Recipe(about, source, {**shared, **options})


# No script before 1 January 2026 adds the balance of a mixture of experts to the loss.
RECIPES: dict[str, Recipe] = {
    "minimind-2504": _minimind(
        "MiniMind, 1 to 28 April 2025",
        schedule="minimind-2504",
        lr=1e-8,
        batch_size=8,
        epochs=2.0,
        balance=0.0,
    ),
    "minimind-2505": _minimind(
        "MiniMind, 29 April to 25 October 2025",
        schedule="minimind-2504",
        lr=1e-8,
        epochs=2.0,
        balance=0.0,
    ),
    "minimind-2510": _minimind(
        "MiniMind, 29 October to 8 December 2025 (from 26 October: --lr 5e-8 --epochs 2)",
        schedule="minimind-2510",
        lr=4e-8,
        epochs=1.0,
        balance=0.0,
    ),
    "minimind-2512": _minimind(
        "MiniMind, 9 December 2025 to 24 March 2026; for a mixture before 1 January add --balance 0",
        schedule="minimind-3",
        lr=4e-8,
        epochs=1.0,
        balance=0.01,
    ),
    "minimind-3": _minimind(
        "MiniMind 3, since 25 March 2026",
        schedule="minimind-3",
        lr=4e-8,
        epochs=1.0,
        balance=5e-4,
        logps="sum",
        beta=0.15,
        think="drop",
    ),
    "tulu-3": _published(
        "Tülu 3 8B (the 70B model: --lr 2e-7)",
        "arXiv:2411.15124, section 5; github.com/allenai/open-instruct, docs/tulu3.md",
        logps="mean",
        beta=5.0,
        lr=5e-7,
        schedule="linear",
        max_length=2048,
    ),
    "olmo-2": _published(
        "OLMo 2 7B and 13B (the 1B model: --lr 2.5e-6)",
        "arXiv:2501.00656, section 4; github.com/allenai/open-instruct, docs/olmo2.md",
        logps="mean",
        beta=5.0,
        lr=8e-7,
        schedule="linear",
        max_length=2048,
    ),
    "zephyr": _published(
        "Zephyr 7B beta, full training as in the handbook",
        "github.com/huggingface/alignment-handbook, recipes/zephyr-7b-beta/dpo/config_full.yaml",
        logps="sum",
        beta=0.01,
        lr=5e-7,
        schedule="cosine",
        max_length=1024,
    ),
    "smollm2": _published(
        "SmolLM2 135M and 360M Instruct (the 1.7B model: --epochs 3)",
        "github.com/huggingface/alignment-handbook, recipes/smollm2/dpo/config_smol.yaml, on 8 GPUs",
        logps="sum",
        beta=0.5,
        lr=1e-6,
        schedule="cosine",
        epochs=2.0,
        max_length=1024,
    ),
    "simpo": _published(
        "SimPO, Llama 3 8B base; it compares without the reference",
        "arXiv:2405.14734; github.com/princeton-nlp/SimPO, training_configs/llama-3-8b-base-simpo.yaml",
        loss="simpo",
        logps="mean",
        beta=2.0,
        # beta times their gamma_beta_ratio of 0.5
        simpo_gamma=1.0,
        lr=6e-7,
        schedule="cosine",
        max_length=2048,
    ),
    "trl": _published(
        "The defaults of TRL's DPOConfig, on one process",
        "github.com/huggingface/trl 1.16, trl/trainer/dpo_config.py",
        logps="sum",
        beta=0.1,
        lr=1e-6,
        schedule="linear",
        warmup=0.0,
        batch_size=8,
        epochs=3.0,
        max_length=1024,
    ),
}


def recipe(name: str | None) -> dict[str, Any]:
    """The options of a recipe by name, for both stages; empty for None.

    Raises:
        ConfigError: there is no such recipe.
    """
    return recipe_named(name).options if name is not None else {}


def recipe_named(name: str) -> Recipe:
    """Raises ConfigError: there is no such recipe."""
    if name not in RECIPES:
        raise ConfigError(f"--recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


@dataclass(frozen=True)
class RecipesConfig:
    """Options of `recipes`."""

    recipe: str | None = option(None, "Show this one as a file for --config.", argument=True, choices=lambda: RECIPES)

    def __post_init__(self) -> None:
        check_options(self)
