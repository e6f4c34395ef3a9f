"""The values that options may have, by name."""

FORMATS = ("auto", "messages", "prompt", "stack-exchange", "sharegpt", "hh")
TRUNCATE = ("right", "left", "refuse")
LOSS_ON = ("response", "assistant")
DTYPES = ("auto", "bfloat16", "float16", "float32")
ON_BAD_ROW = ("skip", "fail")
THINK = ("keep", "drop")
SPECIAL_TEXT = ("plain", "refuse", "allow")
LOGPS = ("mean", "sum")
LAYOUTS = ("auto", "packed", "shared", "padded")
PARALLEL = ("ddp", "fsdp", "hybrid")
MOST_LENGTH, MOST_BLOCK_PAIRS = 2**24, 2**20  # sizes of a cache's arrays follow from them
NO_DIRECTORIES = (".pt", ".bin", ".ckpt", ".safetensors", ".gguf", ".zip", ".tar", ".gz", ".onnx")
SCHEDULES = ("cosine", "linear", "constant", "minimind-2504", "minimind-2510", "minimind-3")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit")
ON_MAX_KL = ("warn", "stop")
TRACKERS = ("wandb", "swanlab", "tensorboard", "trackio")
