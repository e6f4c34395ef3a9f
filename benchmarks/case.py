"""A case of the benchmark: one model and its pairs, which every contestant gets."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import numpy as np
import torch

from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.formats import to_pair
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import ConfigError, RowRefused
from minicache.models import load_model
from minicache.models.load import save_tokenizer
from minicache.options.train import LossOptions
from minicache.pairs import EncodedPair, PairTable
from minicache.scoring.batching import Indices
from minicache.training.losses import Objective

OURS, LIVE, TRL, TRL_PRECOMPUTED = "minicache", "live reference", "TRL", "TRL, precomputed"
BETA, LR, MAX_NORM = 0.1, 1e-6, 1.0
# Weights drawn at random: hidden, layers, heads, kv heads, intermediate, vocabulary
SHAPES = {
    "minimind-3": (768, 8, 8, 4, 2432, 6400),
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936),
    "qwen3-1.7b": (2048, 28, 16, 8, 6144, 151936),
}


@dataclass(frozen=True)
class Case:
    """One model and its pairs.

    model: with float32 weights. dtype: precision of the passes, by autocast. tokenizer: a directory.
    micro_pairs: pairs in a micro-batch of a padded contestant. budget: token slots in a micro-batch of ours.
    file_padding: `padding` of all pairs of the file; `table` holds a part of them.
    """

    name: str
    model: Any
    table: PairTable
    device: torch.device
    dtype: str
    layout: str
    micro_pairs: int
    budget: int
    tokenizer: Path
    file_padding: float

    @property
    def everything(self) -> Indices:
        return np.arange(len(self.table))

    @property
    def shortest(self) -> Indices:
        """The two shortest pairs, for warm-up and for slow computations."""
        return np.argsort(self.table.side_lengths.sum(1), kind="stable")[:2]

    @property
    def objective(self) -> Objective:
        return Objective.parse("sigmoid", "mean", BETA, LossOptions())


class Contestant(Protocol):
    """A trainer that does both stages. `step` may use the result of the last `reference`."""

    def reference(self) -> np.ndarray:
        """Stage one: (N, 2) mean logprobs, nats per token."""

    def step(self, indices: Indices) -> None:
        """Stage two: one optimizer step on these pairs, in micro-batches."""


class Optimizer:
    """The optimizer of all contestants, which train the same weights; made at its first step, to count as memory of the step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.adamw: torch.optim.Optimizer | None = None

    def step(self) -> None:
        if self.adamw is None:
            self.adamw = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


def twin(model: Any) -> Any:
    """A copy of the model that shares its tensors: it takes no memory, and its modules can be changed independently."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def micro_batches(indices: Indices, size: int) -> Iterator[Indices]:
    """Micro-batches in the order of the file, as trainers without length sorting use."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def padding(table: PairTable, micro_pairs: int) -> float:
    """Token slots of a padded contestant as a multiple of the stored tokens, which hold each prefix once."""
    longest = table.side_lengths.max(1)
    slots = sum(2 * len(part) * int(longest[part].max()) for part in micro_batches(np.arange(len(table)), micro_pairs))
    return slots / int(table.lengths.sum())


def heaviest(case: Case) -> Case:
    """The case with only the padded contestants' micro-batch that has the most slots."""
    longest = case.table.side_lengths.max(1)
    parts = list(micro_batches(case.everything, case.micro_pairs))
    pairs = case.table.take(max(parts, key=lambda part: len(part) * int(longest[part].max())))
    return replace(case, table=PairTable.from_pairs(pairs, "int32"))


def make_case(options: argparse.Namespace, name: str) -> Case:
    """The case of a model: a name in SHAPES, or any that `load_model` takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Path(mkdtemp(prefix="minidpo-bench-"))
    save_tokenizer(options.tokenizer, tokenizer, None)
    whole = read_pairs(options, tokenizer)
    count = min(options.pairs, len(whole))
    # evenly spread, so that short and long pairs are as frequent as in the file
    table = PairTable.from_pairs(whole.take(np.arange(count) * len(whole) // count), "int32")
    model: Any = random_model(qwen3_config(*SHAPES[name])) if name in SHAPES else load_model(name).model
    model = model.to(device, torch.float32).requires_grad_(True)
    # the tokenizer may be another model's: for speed the ids must exist, but may be any
    table = replace(table, tokens=table.tokens % model.get_input_embeddings().num_embeddings)
    budget = options.budget or int(options.micro_pairs * table.lengths.sum(1).mean())
    return Case(
        name=name,
        model=model,
        table=table,
        device=device,
        dtype=options.dtype,
        layout=options.layout,
        micro_pairs=options.micro_pairs,
        budget=max(budget, 1),
        tokenizer=tokenizer,
        file_padding=padding(whole, options.micro_pairs),
    )


def read_pairs(options: argparse.Namespace, tokenizer: Path) -> PairTable:
    """The usable pairs of the file."""
    encoder = Encoder(tokenizer=ChatTokenizer.load(tokenizer), max_length=options.max_length)

    def usable() -> Iterator[EncodedPair]:
        for line, row in read_rows(options.data):
            try:
                yield encoder.encode(to_pair(row, "data", line))[0]
            except RowRefused:
                continue

    found = list(usable())
    if len(found) < 2:
        raise ConfigError(f"{options.data}: expected at least 2 pairs that can be used, got {len(found)}")
    return PairTable.from_pairs(found, "int32")


def random_model(config: Any) -> Any:
    """A Qwen3 model of this config with random weights."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


def qwen3_config(
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    wide: int,
    vocabulary: int,
    width: int | None = None,
    tied: bool = True,
) -> Any:
    """The config of a Qwen3 model. width: of an attention head; None is that of Qwen3. tied: the head is the embedding."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=width or (hidden // heads if hidden < 1024 else 128),
        tie_word_embeddings=tied,
        architectures=["Qwen3ForCausalLM"],
    )
    config._attn_implementation = "sdpa"
    return config
