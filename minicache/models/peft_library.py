"""peft, the library of adapters: imported where it is needed, without the warnings that a user cannot act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minicache.errors import ConfigError


def library() -> Any:
    """The module peft. Raises ConfigError: it is not installed."""
    quiet_kernels()
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need another package: pip install 'minidpo[lora]'") from None
    return peft


def quiet_kernels() -> None:
    """Keep bitsandbytes, which peft imports, from warning of kernels that it lacks: quantized.py computes without them."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings that a user cannot act on, or of what is checked here.

    peft 0.21 reads an attribute that transformers 5.23 deprecates, and matches ranks against modules although it sets those of
    stacked experts itself. It corrects `fan_in_fan_out` for each kind of layer. Tied weights, the settings in an
    adapter's file, and what the adapter computes once it is merged have checks of their own.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, message=r".*_pattern keys did not match.*gate_up_proj"
        )
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
        yield
