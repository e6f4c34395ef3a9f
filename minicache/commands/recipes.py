"""`minidpo recipes`."""

from minicache.commands.assemble import Given, command
from minicache.commands.extras import JSON
from minicache.commands.running import errors_as_one_line, out, print_json
from minicache.options.recipes import RECIPES, RecipesConfig
from minicache.screen.recipes import show_recipe, show_recipes


@command(RecipesConfig, after={"recipe": JSON})
def recipes(given: Given) -> None:
    """The published recipes for both stages, with their sources; with a name, its options as a file for --config."""
    with errors_as_one_line():
        name = given.config(RecipesConfig).recipe
        if given.json:
            print_json(out, RECIPES[name] if name else RECIPES)
        elif name:
            show_recipe(out, name)
        else:
            show_recipes(out)
