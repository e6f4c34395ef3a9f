"""Names that options accept and that need no code of their own, and the bounds of a cache's arrays."""

from minicache.data.formats import FORMATS
from minicache.options.catalog import LAYOUTS, names_of

TRUNCATE = ("right", "left", "refuse")
LOSS_ON = ("response", "answer", "assistant")
DTYPES = ("auto", "bfloat16", "float16", "float32")
ON_BAD_ROW = ("skip", "fail")
THINK = ("keep", "drop")
SPECIAL_TEXT = ("plain", "refuse", "allow")
PAIRS = ("best-worst", "best-each", "all")
LOGPS = ("mean", "sum")
PARALLEL = ("ddp", "fsdp", "hybrid")
ON_MAX_KL = ("warn", "stop")
# The sizes of a cache's arrays follow from these: tokens of a side, and pairs of a block.
MOST_LENGTH, MOST_BLOCK_PAIRS = 2**24, 2**20
# Those that --layout and --format accept.
layouts, formats = names_of(LAYOUTS, "auto"), names_of(FORMATS, "auto")
# Suffixes of files, which the name of a directory to create does not have.
NO_DIRECTORIES = (".pt", ".bin", ".ckpt", ".safetensors", ".gguf", ".zip", ".tar", ".gz", ".onnx")


def layout_help() -> str:
    """The help of --layout, with a few words on each layout."""
    *others, last = (f"{name} ({entry.about})" for name, entry in LAYOUTS.items())
    return f"How pairs are laid out in memory: auto, {', '.join(others)} or {last}."
