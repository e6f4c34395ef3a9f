"""The layers of the house: a file imports only from its own room and from rooms below, and no room goes round in a circle.

docs/design.md draws them. Torch stays out of the light rooms.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minicache"
LAYERS = [
    {
        "errors",
        "pairs",
        "disk",
        "drafts",
        "failures",
        "interpreter",
        "hub",
        "json_lines",
        "loggers",
        "machine",
        "objects",
        "strict",
        "text",
    },
    {"data", "trackers", "processes"},
    {"options"},
    {"cache", "models"},
    {"scoring", "reports"},
    {"intake", "judge"},
    {"training", "exchange"},
    {"pictures"},
    {"pages"},
    {"stages"},
    {"screen"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
VOCABULARY = LAYERS[0]  # files that may know each other; all other rooms of a layer do not
LIGHT_ROOMS = ("data", "options", "cache", "judge", "reports", "pictures", "pages", "screen", "commands")
LIGHT_FILES = (
    "cli",
    "disk",
    "drafts",
    "failures",
    "json_lines",
    "strict",
    "pairs",
    "exchange.exported",
    "exchange.hub",
    "exchange.parcels",
    "exchange.rows",
    "exchange.tables",
    "intake.merging",
    "processes.launch",
    "processes.signals",
    "stages.diff",
    "stages.export_cache",
    "stages.import_cache",
    "stages.inspect",
    "stages.merge",
    "stages.plot",
    "stages.push",
    "stages.push_cache",
    "stages.push_policy",
    "stages.report",
    "trackers",
    "training.lock",
    "training.order",
    "training.pinned",
    "training.progress",
    "training.run_directory",
)
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


def module_of(file: Path) -> str:
    """The dotted name of a file below minicache."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Modules of minicache that a file imports anywhere, also for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minicache":
            base = (node.module or "").removeprefix("minicache").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("minicache.") for alias in node.names if alias.name[:10] == "minicache."}
    return found & MODULES.keys()


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_from_its_own_room_and_from_rooms_below(module: str) -> None:
    own = room_of(module)
    assert own in LEVEL, f"{module} has no layer: add it to LAYERS"
    for imported in map(room_of, imports_of(MODULES[module])):
        allowed = imported == own or LEVEL[imported] < LEVEL[own] or {imported, own} <= VOCABULARY
        assert allowed, f"{module} imports {imported}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Not even for the types of their signatures."""
    try:
        TopologicalSorter({module: imports_of(file) - {module} for module, file in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_every_room_of_the_list_exists() -> None:
    assert {room_of(module) for module in MODULES} == set(LEVEL)


def test_the_light_rooms_work_without_torch() -> None:
    light = [name for name in MODULES if room_of(name) in LIGHT_ROOMS] + list(LIGHT_FILES)
    light.remove("cache.places.bucket")  # needs the s3 extra
    light.remove("cache.places.leases")
    imports = "; ".join(f"import minicache.{name}" for name in light)
    code = f"import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; {imports}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['minidpo', '--help']; from minicache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "precompute-ref" in done.stdout and "inspect-cache" in done.stdout
