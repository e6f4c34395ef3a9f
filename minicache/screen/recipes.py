"""What `minidpo recipes` prints. rich only; no torch."""

from rich.console import Console
from rich.text import Text

from minicache.options.config_file import as_toml
from minicache.options.declare import options_of
from minicache.options.recipes import RECIPES
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig


def show_recipes(console: Console) -> None:
    """Whose each recipe is, and its main options."""
    width = max(map(len, RECIPES))
    for name, entry in RECIPES.items():
        own = entry.options
        loss = f"{own['loss']} loss, " if "loss" in own else ""
        console.print(Text.assemble((f"{name:<{width}}", "bold"), f"  {entry.about}"), soft_wrap=True)
        console.print(
            f"{'':<{width}}  {loss}{own['logps']} logprobs, beta {own['beta']:g}, lr {own['lr']:g} {own['schedule']}, "
            f"batch {own['batch_size']}, epochs {own['epochs']:g}",
            style="dim",
            highlight=False,
            soft_wrap=True,
        )
    console.print("\nminidpo recipes NAME shows one whole; --recipe NAME uses it, in both stages", highlight=False)


def show_recipe(console: Console, name: str) -> None:
    """A recipe as a file for --config, a table for each stage."""
    entry = RECIPES[name]
    console.out(f"# {name}: {entry.about}\n# Source: {entry.source}", highlight=False)
    for command, config in (("precompute-ref", PrecomputeConfig), ("train", TrainConfig)):
        own = {item.name for item, _ in options_of(config)}
        values = {option: value for option, value in entry.options.items() if option in own}
        console.out(f"\n[{command}]\n{as_toml(values)}", end="", highlight=False)
