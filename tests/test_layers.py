"""The layers of the design: a file imports only from lower layers and from its own package; torch stays out of the light parts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minicache"
LAYERS = [
    {"errors", "pairs", "inspection", "text", "sweeps"},
    {"config", "trackers", "disk", "signals", "markup"},
    {"config_train", "config_exchange", "data", "cache", "screen", "launch", "runs", "charts"},
    {"distributed", "models", "batch", "head", "attention", "screen_inspect", "screen_diff", "speed", "plots"},
    {"config_sweep", "screen_sweep", "plots_sweep"},
    {"scoring"},
    {"losses", "optim", "checkpoints", "parallel"},
    {"metrics"},
    {"evaluation", "budget"},
    {"stages"},
    {"command"},
    {"cli_diff", "cli_exchange", "cli_report", "cli_train"},
    {"cli_sweep"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TORCH_FREE = [
    "config",
    "pairs",
    "trackers",
    "screen",
    "screen_inspect",
    "screen_diff",
    "config_sweep",
    "screen_sweep",
    "plots_sweep",
    "launch",
    "runs",
    "disk",
    "config_train",
    "cli",
    "stages.inspect",
    "stages.merge",
    "stages.diff",
    "stages.export_cache",
    "stages.import_cache",
    "config_exchange",
]
TORCH_FREE += [
    f"data.{name}"
    for name in ("records", "formats", "special", "tokenizers", "encode", "workers", "batching", "tables")
]
TORCH_FREE += ["plots", "stages.plot", "stages.compare_page", "stages.compare_prompts"]
TORCH_FREE += ["stages.cache_page", "stages.run_page"]
TORCH_FREE += [
    f"cache.{name}"
    for name in (
        "schema",
        "reader",
        "writer",
        "claims",
        "places",
        "where",
        "objects",
        "leases",
        "repack",
        "strict",
        "bounded",
        "drafts",
    )
]


def unit(file: Path) -> str:
    """The unit of the layering a file belongs to: its package below minicache, or itself."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(tree: ast.AST) -> set[str]:
    """Units of minicache that a file imports, those under TYPE_CHECKING left out."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minicache":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("minicache.")}
        found |= runtime_imports(node)
    return found & LEVEL.keys()


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_layers_and_its_own_package(file: Path) -> None:
    own = unit(file)
    assert own in LEVEL, f"{file.name} has no layer: add it to LAYERS"
    for imported in runtime_imports(ast.parse(file.read_text(encoding="utf-8"))):
        assert imported == own or LEVEL[imported] < LEVEL[own], f"{own} imports {imported}"


def test_every_unit_of_the_list_exists() -> None:
    assert {unit(file) for file in FILES} == set(LEVEL)


def test_the_light_modules_work_without_torch() -> None:
    imports = "; ".join(f"import minicache.{name}" for name in TORCH_FREE)
    code = f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; {imports}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['minidpo', '--help']; from minicache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "precompute-ref" in done.stdout and "inspect-cache" in done.stdout
