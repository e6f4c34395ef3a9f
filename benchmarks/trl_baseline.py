"""TRL's DPOTrainer as a contestant, step by step on the same token ids: with its own collator, loss and backward pass."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.case import BETA, LR, Case, Optimizer, micro_batches, twin
from minicache.errors import ConfigError
from minicache.pairs import EncodedPair, PairTable
from minicache.scoring.batching import Indices


class Trl:
    """A `Contestant`. precompute: with `precompute_ref_log_probs=True`; otherwise with a reference model beside the policy."""

    def __init__(self, case: Case, optimizer: Optimizer, precompute: bool) -> None:
        self.case, self.optimizer, self.precompute = case, optimizer, precompute
        self.rows = rows_of(case.table)
        self.trainer = trainer_of(
            twin(case.model),
            None if precompute else twin(case.model),
            self.rows,
            case.tokenizer,
            beta=BETA,
            learning_rate=LR,
            per_device_train_batch_size=case.micro_pairs,
            precompute_ref_log_probs=precompute,
            bf16=case.dtype == "bfloat16",
            fp16=case.dtype == "float16",
            use_cpu=case.device.type == "cpu",
        )

    @cached_property
    def model(self) -> Any:
        """The policy as TRL's training loop uses it; made at its first use, because accelerate wraps forward permanently."""
        return self.trainer.accelerator.prepare_model(self.trainer.model)

    def reference(self) -> np.ndarray:
        """(N, 2) mean logprobs, nats per token, computed as `_precompute_ref_logps` does, without its data loader and file."""
        trainer, parts = self.trainer, []
        for indices in micro_batches(self.case.everything, self.case.micro_pairs):
            both = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, self._inputs(indices))
            parts.append(torch.stack(both, 1).cpu().numpy())
        sums = np.concatenate(parts)  # (N, 2)
        for row, (chosen, rejected) in zip(self.rows, sums.tolist(), strict=True):
            if self.precompute:
                row |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return sums / self.case.table.token_counts

    def step(self, indices: Indices) -> None:
        """One optimizer step on these pairs."""
        parts = list(micro_batches(indices, self.case.micro_pairs))
        self.trainer.current_gradient_accumulation_steps = len(parts)
        for part in parts:
            self.trainer.training_step(self.model, self._inputs(part))
        self.optimizer.step()

    def _inputs(self, indices: Indices) -> dict[str, torch.Tensor]:
        return self.trainer._prepare_inputs(self.trainer.data_collator([self.rows[int(index)] for index in indices]))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within this context TRL's head scores the counted positions alone, as where there is Triton; elsewhere it scores all."""
    from trl.trainer import utils

    kept, utils._use_triton = utils._use_triton, lambda device: True
    try:
        yield
    finally:
        utils._use_triton = kept


def rows_of(table: PairTable) -> list[dict[str, Any]]:
    """The pairs in TRL's columns, each up to its last counted token.

    Raises:
        ConfigError: TRL cannot count what a pair counts.
    """
    return [_row(table[index], index) for index in range(len(table))]


def _row(pair: EncodedPair, index: int) -> dict[str, Any]:
    """A pair in TRL's columns, up to its last counted token.

    Raises:
        ConfigError: not all tokens of an answer count, or the prompts differ. TRL counts all tokens of an answer.
    """
    columns: dict[str, Any] = {}
    begins = []
    for side, name in enumerate(("chosen", "rejected")):
        ids, mask = pair.side(side)
        counted = np.flatnonzero(mask)
        begin, end = int(counted[0]), int(counted[-1]) + 1
        if not mask[begin:end].all():
            raise ConfigError(f"pair {index}: TRL cannot leave out tokens within an answer; choose other --data")
        columns |= {"prompt_ids": ids[:begin].tolist(), f"{name}_ids": ids[begin:end].tolist()}
        begins.append(begin)
    if begins[0] != begins[1]:
        raise ConfigError(f"pair {index}: TRL needs one prompt for both sides; choose other --data")
    return columns


def trainer_of(policy: Any, reference: Any, rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> Any:
    """TRL's trainer on these rows. reference: a model, or None. settings: of its DPOConfig.

    Raises:
        ImportError: TRL or datasets is not installed.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):
        """A trainer on token ids, so that its pairs are the same as those of the other contestants."""

        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
            # `Trl.reference` computes them, to measure the time
            return dataset

    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        # TRL uses names that newer transformers deprecates
        warnings.simplefilter("ignore", FutureWarning)
        config = DPOConfig(
            output_dir=scratch,
            max_length=None,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            report_to="none",
            **settings,
        )
        return Encoded(
            policy,
            reference,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
        )
