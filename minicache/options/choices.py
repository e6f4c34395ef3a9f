"""Names that options take and that no other code hangs on, and the bounds of a cache's arrays."""

from minicache.options.catalog import LAYOUTS

TRUNCATE = ("right", "left", "refuse")
LOSS_ON = ("response", "assistant")
DTYPES = ("auto", "bfloat16", "float16", "float32")
ON_BAD_ROW = ("skip", "fail")
THINK = ("keep", "drop")
SPECIAL_TEXT = ("plain", "refuse", "allow")
LOGPS = ("mean", "sum")
PARALLEL = ("ddp", "fsdp", "hybrid")
ON_MAX_KL = ("warn", "stop")
# Sizes of a cache's arrays follow from these.
MOST_LENGTH, MOST_BLOCK_PAIRS = 2**24, 2**20
NO_DIRECTORIES = (".pt", ".bin", ".ckpt", ".safetensors", ".gguf", ".zip", ".tar", ".gz", ".onnx")


def layouts() -> tuple[str, ...]:
    """The names that --layout takes."""
    return ("auto", *LAYOUTS)


def layout_help() -> str:
    """What each layout is, for the help of --layout."""
    *others, last = (f"{name} ({entry.about})" for name, entry in LAYOUTS.items())
    return f"auto, or how pairs lie in memory: {', '.join(others)}, {last}."
