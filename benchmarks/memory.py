"""Bytes a frozen weight takes in stage one and in a LoRA run, by the operating system's account: python -m benchmarks.memory.

A random Llama is stored in bfloat16. Each measurement is a process of its own, on the CPU: its peak of resident memory, pages of
mapped files included, above the same command on a model of a few thousand weights, which imports the same.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SAMPLE = Path(__file__).parents[1] / "minicache" / "sample" / "heldout.jsonl"
# hidden, layers, heads, kv heads, intermediate, vocabulary
LARGE, SMALL = (1024, 14, 16, 8, 2816, 24000), (32, 1, 2, 2, 64, 512)
STAGES = ("one", "lora")
PAIRS, STEPS, TOKENS = 8, 3, 256
TEMPLATE = "{% for m in messages %}{{ '<|s|>' + m['role'] + '\n' + m['content'] + '<|e|>\n' }}{% endfor %}"


def make_model(directory: Path, shape: tuple[int, ...], is_tied: bool) -> int:
    """Write a random model with a tokenizer, in bfloat16; returns its number of weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, intermediate, vocabulary = shape
    config: Any = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.normal_(0, 0.02)
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return sum(weight.numel() for weight in model.parameters())


def make_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|s|>", "<|e|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE.read_text(encoding="utf-8")], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|e|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def do(stage: str, model: Path, dtype: str, cache: Path) -> None:
    """Score the first pairs of the sample into a cache, or train adapters on that cache for a few steps."""
    import torch

    from minicache.options.stage_one import PrecomputeConfig
    from minicache.options.train import LoraOptions, TrainConfig
    from minicache.processes.world import World
    from minicache.stages.precompute import precompute
    from minicache.stages.train import train
    from minicache.trackers import Silent

    world = World(0, 1, torch.device("cpu"))
    if stage == "one":
        data = cache.with_suffix(".jsonl")
        data.write_text("".join(SAMPLE.read_text(encoding="utf-8").splitlines(True)[:PAIRS]), encoding="utf-8")
        precompute(
            PrecomputeConfig(str(model), (str(data),), cache, dtype=dtype, tokens_per_batch=TOKENS), world, Silent()
        )
        return
    config = TrainConfig(
        ref_cache=(str(cache),),
        out=cache.with_suffix(".run"),
        batch_size=2,
        max_steps=STEPS,
        dtype=dtype,
        tokens_per_micro_batch=TOKENS,
        lora=LoraOptions(lora_rank=8),
    )
    train(config, world, Silent())


def status(name: str) -> int:
    """Bytes, by the system's count of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def in_a_process(*words: str) -> dict[str, int]:
    """What this program prints with these words behind it."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", help="precision of the passes")
    parser.add_argument("--tied", action="store_true", help="embeddings and head share their weights")
    parser.add_argument("--work", help="directory for the models, 0.4 GB; by default that for temporary files")
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "MODEL", "CACHE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        stage, model, cache = given.child
        if stage == "make":
            print(json.dumps({"weights": make_model(Path(model), LARGE if cache == "large" else SMALL, given.tied)}))
            return
        do(stage, Path(model), given.dtype, Path(cache))
        gc.collect()
        print(json.dumps({name: status(name) for name in ("VmHWM", "RssAnon", "RssFile")}))
        return
    with TemporaryDirectory(prefix="minidpo-", dir=given.work) as work:
        compare(Path(work), ["--dtype", given.dtype, *(["--tied"] if given.tied else [])])


def compare(work: Path, options: list[str]) -> None:
    """Print what each stage takes with the large model beyond what it takes with the small one."""
    weights = {
        size: in_a_process("--child", "make", str(work / size), size, *options)["weights"]
        for size in ("small", "large")
    }
    frozen = weights["large"] - weights["small"]
    print(f"{frozen / 1e6:.0f}M weights stored in bfloat16, {' '.join(options)}")
    for stage in STAGES:
        small, large = (
            in_a_process("--child", stage, str(work / size), str(work / f"{size}-cache"), *options) for size in weights
        )
        more = {name: (large[name] - small[name]) / frozen for name in large}
        print(
            f"stage {stage:5} peak {more['VmHWM']:.2f} bytes a weight; at the end {more['RssAnon']:.2f} in memory of its own, "
            f"{more['RssFile']:.2f} in mapped files"
        )


if __name__ == "__main__":
    main()
