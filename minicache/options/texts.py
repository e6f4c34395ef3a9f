"""Help texts that several commands share."""

REF_CACHE = "The reference cache: a directory, or s3://bucket/name, gs://…, az://…"
READ_CACHE = f"{REF_CACHE}, or a data set of the Hub: hf://datasets/org/name[@revision]."
DTYPE = "auto (bfloat16 on a GPU, float16 if it has none; else float32), bfloat16, float16 or float32."
TRUST = "Run code that comes with the model."
SCRATCH = (
    "Decode the pairs into a file in this directory. (Default: into memory; if it is too small, $TMPDIR or /var/tmp.)"
)
PARALLEL = "With several processes: ddp (a copy each), fsdp (shards), hybrid (shards in a node, a copy per node)."
COMPILE = "torch.compile the decoder's layers; the first batches take long."
WEIGHTS = (
    "Precision of the policy's weights where all are trained: float32, or bfloat16, rounded stochastically, with AdamW's state in "
    "8 bits (torchao)."
)
TOKENS_PER_BATCH = "Token slots of one forward pass. (Default: as many as fit in memory.)"
AS_STAGE_ONE = "As for precompute-ref."
COLUMNS = "Columns with other names, such as prompt=question,chosen=answers.0.text; a path leads into nested ones."
IGNORE_FIELDS = "Columns, and keys of turns, to pass over: name,name."
PAIRS = "The pairs of a list of ranked or scored answers: {names}."
TEMPLATE_ARG = "A value that the chat template reads, such as enable_thinking=false; may be given several times."
DATE = "The date, YYYY-MM-DD, for a chat template that asks for today's. (Default: the same one on every day.)"
