"""Hugging Face directories, hub ids and .gguf files, through transformers. Weights keep the precision they were stored in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from minicache.errors import ModelError
from minicache.failures import panics_as_errors
from minicache.models import stored
from minicache.models.described import require_countable, require_held
from minicache.models.directories import broken_file, missing_file, require_plain_files
from minicache.models.file_kinds import SAVE, is_path
from minicache.models.gguf_header import require_header
from minicache.models.whole import require_language_model, require_whole
from minicache.text import one_line

TIKTOKEN_CACHE = "TIKTOKEN_CACHE_DIR"  # "" is none
# What was asked of the hub in vain, by class and id, and what was said: it is not asked once more, which may take a minute.
IN_VAIN: dict[tuple[str, str], str] = {}


def load(source: str, trust_remote_code: bool) -> nn.Module:
    """The causal language model at `source`, in the precision it is stored in, all of its weights from its files.

    Its attention is transformers' choice: sdpa, or eager for a family without it.

    Raises:
        ModelError: there is none, transformers cannot load it, or it is not whole.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, source, trust_remote_code)
    require_language_model(source, config)
    is_gguf = Path(source).suffix == ".gguf"
    with without_reports():
        require_held(source, config)
    # weights of another shape are refused below, by name
    options = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    how = {} if is_gguf else stored.loading_options(source, config)
    with stored.quietly(source) if how else nullcontext():
        model, info = from_pretrained(AutoModelForCausalLM, source, trust_remote_code, **options, **how)
    require_whole(source, config, model, info)
    if is_gguf:
        # The weights are plain tensors by now. A model marked as quantized could not be saved or trained.
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)
    else:
        stored.settle(model, source)
    assert isinstance(model, nn.Module)
    return model


def quiet() -> None:
    """Turn off the progress bars of transformers: the commands show their own."""
    from transformers.utils import logging

    turn_off: Any = logging.disable_progress_bar
    turn_off()


def from_pretrained(cls: Any, source: str, trust_remote_code: bool, **options: Any) -> Any:
    """An object of a transformers class, from a directory, a hub id or a .gguf file.

    Raises:
        ModelError: there is none, or transformers cannot load it.
    """
    from transformers import AutoConfig, PretrainedConfig

    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{source}: no such file")
        _require_gguf(source)
        require_header(path)
        source, options = str(path.parent), {**options, "gguf_file": path.name}
    elif not path.is_dir() and (path.exists() or is_path(source)):
        raise ModelError(f"{source}: expected a model directory, a .gguf or .pth file, or a hub id like org/name")
    elif path.is_dir():
        require_plain_files(path)
    quiet()
    if said := IN_VAIN.get((cls.__name__, source)):
        raise ModelError(said)
    try:
        with without_reports(), without_cache_of_tiktoken(), panics_as_errors():
            if "gguf_file" not in options and (cls is AutoConfig or (path / "config.json").is_file()):
                require_countable(source, PretrainedConfig.get_config_dict(source)[0])
            return cls.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except ModelError:
        raise
    # transformers may raise anything on a damaged file
    except Exception as error:
        if path.is_dir() and (broken := broken_file(path) or missing_file(path, "Tokenizer" in cls.__name__)):
            raise ModelError(broken) from error
        line = one_line(error)
        if "Weights only load failed" in line:
            line = f"its weights' file holds more than tensors, which is never run; expected weights alone: {SAVE}"
        hint = " (add --trust-remote-code if you trust its authors)" if "trust_remote_code" in line else ""
        what = "transformers cannot load it" if path.exists() else "no such directory, and no hub id that can be loaded"
        said = f"{path}: {what}: {line[:300]}{hint}"
        if isinstance(error, OSError) and not path.exists():
            IN_VAIN[cls.__name__, source] = said
        raise ModelError(said) from error


@contextmanager
def without_reports() -> Iterator[None]:
    """Keep transformers from printing what it finds about a checkpoint: `require_whole` refuses or the stage notes it."""
    from transformers.utils import logging

    library: Any = logging
    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(before)


@contextmanager
def without_cache_of_tiktoken() -> Iterator[None]:
    """Let tiktoken read a vocabulary itself: it keeps copies by their paths alone, in a folder that others may write to."""
    before = os.environ.get(TIKTOKEN_CACHE)
    os.environ[TIKTOKEN_CACHE] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[TIKTOKEN_CACHE]
        else:
            os.environ[TIKTOKEN_CACHE] = before


def _require_gguf(source: str) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(f"{source}: reading .gguf needs two more packages: pip install 'minidpo[gguf]'") from None
