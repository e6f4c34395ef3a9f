"""Help texts and bounds that several commands share."""

from minicache.data.formats import FORMATS

REF_CACHE = "The reference cache: a directory, or s3://bucket/name, gs://…, az://…"
DTYPE = "auto (bfloat16 on CUDA, else float32), bfloat16, float16 or float32."
TRUST = "Run code that comes with the model."
SCRATCH = "Decode the pairs into a file here, for all processes. (Default: $TMPDIR or /var/tmp if memory is too small.)"
PARALLEL = "Of several processes: ddp (a copy each), fsdp (in shards), hybrid (shards in a node, a copy each)."
TOKENS_PER_BATCH = "Token slots of one forward pass. (Default: many, and half as many where they don't fit.)"
AS_STAGE_ONE = "As of precompute-ref."


def formats() -> tuple[str, ...]:
    """The names that --format takes."""
    return ("auto", *FORMATS)
