"""The command line in this process, for fixtures and scripts that outlive one test."""

from typer.testing import CliRunner

from minicache.cli import app, expand_data


def minidpo(*arguments: object) -> str:
    """Run one command; return its stdout. Raises AssertionError with its stderr unless the exit code is 0."""
    result = CliRunner().invoke(app, expand_data([str(argument) for argument in arguments]))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout
