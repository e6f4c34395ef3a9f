"""Where an adapter, its base and its tokenizer lie: directories, hub ids, or the directory of the run that made them."""

from functools import cache
from pathlib import Path

from minicache.data.tokenizer_files import TEMPLATE
from minicache.disk import read_json, read_whole
from minicache.errors import ModelError
from minicache.models.adapter_files import ADAPTER
from minicache.models.file_kinds import is_path

# The merged base of a run's adapters, in the run's directory.
MERGED_BASE = "base"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def adapter_place(source: str) -> Path | None:
    """The directory of the adapter of this name, which may be a hub id; None if it is no adapter."""
    path = Path(source)
    if (path / ADAPTER).is_file():
        return path
    if path.exists() or source.count("/") != 1 or is_path(source):
        return None
    if _from_hub(source, ADAPTER) is None:
        return None
    file = _from_hub(source, "adapter_model.safetensors") or _from_hub(source, "adapter_model.bin")
    if file is None:
        raise ModelError(f"{source}: this adapter has no adapter_model.safetensors")
    for name in (*TOKENIZERS, "special_tokens_map.json", "added_tokens.json", "merges.txt", TEMPLATE):
        _from_hub(source, name)
    return file.parent


@cache
def _from_hub(source: str, name: str) -> Path | None:
    """A file of a hub repository, downloaded if it is not here yet; None where there is none, or no connection.

    The hub is asked once: without a connection that alone takes half a minute.
    """
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    # what is wrong with the name is said when the model is loaded
    except (OSError, ValueError):
        return None
    return Path(file) if file else None


def base_of(directory: Path) -> str | None:
    """The name of the base model in an adapter's directory; None if the directory holds no adapter.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    file = directory / ADAPTER
    if not file.is_file():
        return None
    name = read_json(file, ModelError).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{file}: base_model_name_or_path: expected the name of the base model, got {name!r}")
    return name


def base_name(directory: Path) -> str:
    """The name of an adapter's base; for one that a run wrote beside it, where it is now: the run may have moved.

    Raises:
        ModelError: the adapter's configuration cannot be read.
    """
    name = base_of(directory)
    assert name is not None
    below, seen = Path(name), {directory.resolve()}
    while next_name := base_of(below):
        if below.resolve() in seen:
            raise ModelError(
                f"{directory}: base_model_name_or_path in {ADAPTER} comes back to {below}; expected a base model"
            )
        seen.add(below.resolve())
        below = Path(next_name)
    if Path(name).exists() or Path(name).name != MERGED_BASE:
        return name
    # of RUN/model, or of RUN/checkpoints/step-000500/model
    above = directory.resolve().parents
    beside = [run / MERGED_BASE for run in (above[0], *above[2:3]) if (run / MERGED_BASE / "config.json").is_file()]
    return str(beside[0]) if beside else name


def tokenizer_place(source: str) -> str:
    """The name of what holds the tokenizer of a model: its own, or for an adapter without one its base's.

    Raises:
        ModelError: an adapter's configuration cannot be read.
    """
    while adapter := adapter_place(source):
        if any((adapter / name).is_file() for name in TOKENIZERS):
            return str(adapter)
        source = base_name(adapter)
    return source


def own_template(directory: Path) -> str | None:
    """The chat template in a directory; None if there is none. Raises ModelError: it cannot be read."""
    file = directory / TEMPLATE
    try:
        return read_whole(file).decode() if file.is_file() else None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
