"""One of several processes that run the same stages one after another: python -m tests.processes.parallel_worker JOBS.json."""

import json
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from minicache.errors import FullMemory
from minicache.models.fingerprint import fingerprint
from minicache.options.dictionaries import fill
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.processes.world import join_world, leave_world
from minicache.scoring import foresight
from minicache.stages.precompute import precompute
from minicache.stages.train import FROM_DISK, _prepare, train
from minicache.trackers import Silent
from minicache.training import step as steps
from minicache.training import validation
from minicache.training.losses import Logps
from minicache.training.snapshot import begin
from minicache.training.step import plan
from minicache.training.validation import pair_logps


def see_one_copy(config: TrainConfig) -> None:
    """Take steps of several micro-batches with DDP, and look before each backward pass that the gradients lie in its buckets."""
    run, _ = _prepare(config, None, world, Silent(), FROM_DISK)
    training = begin(run, None)
    gradients: set[int] = set()
    buckets: set[int] = set()

    def reduce(group: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buckets.add(bucket.buffer().untyped_storage().data_ptr())
        return allreduce_hook(group, bucket)  # type: ignore[arg-type]

    def looking(*arguments: Any) -> Logps:
        for each in (each for each in run.scorer.parameters() if each.requires_grad):
            assert each.grad is not None
            gradients.add(each.grad.untyped_storage().data_ptr())
        return pair_logps(*arguments)

    assert isinstance(training.forward, DistributedDataParallel)
    training.forward.register_comm_hook(None, reduce)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "pair_logps", looking)
        for mine in islice(plan(run, 0), 3):
            assert len(mine.parts) > 1
            gradients.clear()
            buckets.clear()
            steps.take_step(run, training, mine)
            assert gradients == buckets


def see_all_refuse(config: TrainConfig) -> None:
    """Memory is short on rank 1 alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foresight, "free_bytes", lambda device, processes: 1e12 if world.is_main else 1e3)
        with pytest.raises(FullMemory, match=r"1.0 kB are free on process 1 of 2; got .* Nothing was loaded"):
            train(config, world, Silent())


def see_same_weights(config: TrainConfig) -> None:
    """Take steps with DDP, and compare every bit of the weights after each."""
    run, _ = _prepare(config, None, world, Silent(), FROM_DISK)
    training = begin(run, None)
    seen = {fingerprint(run.scorer.model)}
    # what a process drew before must not matter
    torch.manual_seed(world.rank)
    for mine in islice(plan(run, 0), 3):
        steps.take_step(run, training, mine)
        training.progress.step += 1
        (digest,) = world.agree(lambda: {"weights": fingerprint(run.scorer.model)}).values()
        assert digest not in seen
        seen.add(digest)


def see_a_stop_within_a_validation(config: TrainConfig) -> None:
    """Rank 1 alone is asked, in its first batch: it leaves its share, and both leave the run."""
    batches: list[int] = []

    def asked(*arguments: Any) -> Logps:
        batches.append(1)
        if not world.is_main and len(batches) == 1:
            signal.raise_signal(signal.SIGTERM)
        return pair_logps(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "pair_logps", asked)
        with pytest.raises(KeyboardInterrupt, match="steps is saved; the same command with --resume goes on"):
            train(config, world, Silent())
    first, second = world.gather(len(batches))
    assert first > second == 1


world = join_world()
for stage, options in json.loads(Path(sys.argv[1]).read_text()):
    if stage == "buckets":
        see_one_copy(fill(TrainConfig, options))
    elif stage == "refused":
        see_all_refuse(fill(TrainConfig, options))
    elif stage == "weights":
        see_same_weights(fill(TrainConfig, options))
    elif stage == "stopped":
        see_a_stop_within_a_validation(fill(TrainConfig, options))
    elif stage == "train":
        train(fill(TrainConfig, options), world, Silent())
    else:
        precompute(fill(PrecomputeConfig, options), world, Silent())
leave_world()
