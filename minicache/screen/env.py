"""What `minidpo env` prints: lines that can be pasted into a report."""

from rich.console import Console

from minicache.reports.environment import Environment


def show_environment(console: Console, found: Environment) -> None:
    lines = [
        ("minidpo", found.minidpo),
        ("python", found.python),
        ("system", f"{found.system}, {found.processors} processors"),
        ("gpu", "; ".join(found.devices) or f"none that torch sees (torch is built for {_build(found)})"),
        *((name, installed or "missing") for name, installed in found.packages.items()),
        *((f"[{extra}]", _packages(names)) for extra, names in found.extras.items()),
        *found.variables.items(),
    ]
    if found.problem:
        lines.insert(4, ("torch", f"cannot be used: {found.problem}"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.out(f"{name:<{width}}  {text}", highlight=False)


def _build(found: Environment) -> str:
    return f"CUDA {found.cuda}" if found.cuda else "the CPU"


def _packages(names: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {installed or 'missing'}" for name, installed in names.items())
