"""Help texts that several commands share."""

from minicache.data.formats import FORMATS

REF_CACHE = "The reference cache: a directory, or s3://bucket/name, gs://…, az://…"
DTYPE = "auto (bfloat16 on CUDA, else float32), bfloat16, float16 or float32."
TRUST = "Run code that comes with the model."
SCRATCH = (
    "Decode the pairs into a file in this directory. (Default: into memory; if it is too small, $TMPDIR or /var/tmp.)"
)
PARALLEL = "With several processes: ddp (a copy each), fsdp (shards), hybrid (shards in a node, a copy per node)."
TOKENS_PER_BATCH = "Token slots of one forward pass. (Default: many, halved where they do not fit in memory.)"
AS_STAGE_ONE = "As for precompute-ref."


def formats() -> tuple[str, ...]:
    """The names that --format accepts."""
    return ("auto", *FORMATS)
