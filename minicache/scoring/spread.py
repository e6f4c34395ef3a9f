"""A model over several processes: a copy on each (DDP), or shards (FSDP2), of which no process ever holds all twice.

Source: Zhao et al. 2023, PyTorch FSDP, arXiv:2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from minicache.errors import ConfigError
from minicache.models import layers_of
from minicache.models.lora import adapt
from minicache.models.precision import hold_for, look_up_in_float32
from minicache.models.quantized import is_quantized
from minicache.processes.world import STEP, World
from minicache.scoring.head import Head
from minicache.scoring.probe import decoder_of, probed
from minicache.scoring.scorer import DTYPES, Scorer
from minicache.text import one_line

log = logging.getLogger(__name__)


def is_sharded(parallel: str, world: World) -> bool:
    """Whether --parallel and the number of processes make shards of the model."""
    return parallel != "ddp" and world.size > 1


def shards_of(parallel: str, world: World) -> int:
    """The number of devices that the model is cut over; 1 if it is whole."""
    if not is_sharded(parallel, world):
        return 1
    return world.size if parallel == "fsdp" else world.local_size


def refuse_quantized_shards(model: nn.Module | None, parallel: str, world: World) -> None:
    """Raises ConfigError on all ranks: the model, as rank 0 has it, is quantized and would be sharded."""
    if is_sharded(parallel, world) and world.broadcast(model is not None and is_quantized(model)):
        raise ConfigError(f"--parallel {parallel}: quantized weights cannot be sharded; expected --parallel ddp")


def spread(model: nn.Module | None, dtype: str, parallel: str, world: World, weights: str = "float32") -> Scorer:
    """The scorer of a model on this rank's device: with the whole model, or with this rank's shard of it.

    model: needed on all ranks, or on rank 0 only if it is to be sharded. weights: precision of those that are trained.

    Raises:
        ConfigError: the model cannot be sharded, or the processes cannot be grouped as asked.
    """
    if not is_sharded(parallel, world):
        assert model is not None
        scorer = world.each(lambda: Scorer(hold_for(model, world.device, dtype, weights), dtype))
        # one way to compute logits, and one count of their memory
        if not all(world.together(lambda: scorer.head is not None)):
            scorer.head = None
        return scorer
    refuse_quantized_shards(model, parallel, world)
    mesh = _mesh(parallel, world)
    plan = world.first(lambda: _describe(model, dtype))
    skeleton = world.each(lambda: _skeleton(plan))
    layers = layers_of(skeleton)
    if not layers:
        raise ConfigError(f"--parallel {parallel}: this model's code marks no layers to shard; expected --parallel ddp")
    scorer = Scorer(skeleton, dtype, head_is_own=plan["head_is_own"])
    scorer.shards, scorer.lockstep, scorer.ends_apart = mesh.size(mesh.ndim - 1), world, plan["ends_apart"]
    outline = copy.deepcopy(scorer)
    scorer.whole = lambda: outline
    # Layers are gathered in the precision they compute in. The activations between them stay float32, as with autocast alone.
    half = MixedPrecisionPolicy(
        param_dtype=DTYPES[dtype] if dtype != "float32" else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # What is in no layer is resharded after each forward too: code between steps must see the shards, not the whole.
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    try:
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=half)
        if scorer.head and scorer.ends_apart:
            scorer.head = _shard_ends(skeleton, scorer.head, mesh, whole)
        fully_shard(scorer, mesh=mesh, mp_policy=whole, reshard_after_forward=True)
    # torch's own errors on layers that share weights or wrap each other (Zamba)
    except (TypeError, ValueError, AssertionError) as error:
        line = one_line(error, 200)
        raise ConfigError(
            f"--parallel {parallel}: torch cannot cut this model into shards: {line}; expected --parallel ddp"
        ) from error
    if model is not None:
        # What rank 0 saves with an adapter; tensors that no other rank needs.
        for name in ("below", "kept_weights", "base_beside"):
            setattr(skeleton, name, getattr(model, name, None))
    scorer.to_empty(device=world.device)
    _fill(skeleton, model, world)
    return scorer


@dataclass(frozen=True)
class ShardedHead(Head):
    """A head that is whole while it computes, forward and backward, and in shards while the layers do.

    tied: its weight is the embedding's, so that both are one unit, which FSDP itself would keep whole from the first to the last.
    """

    tied: bool = False

    def logps(self, hidden: torch.Tensor, targets: torch.Tensor, distribution: bool) -> tuple[torch.Tensor, ...]:
        """As `Head.logps`."""
        linear: Any = self.linear
        if self.tied:
            linear.unshard()
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: linear.reshard())
        # called as a module, around which FSDP gathers and frees
        outputs: tuple[torch.Tensor, ...] = linear(hidden, targets, distribution)
        return outputs


@torch.no_grad()
def _may_part(model: Any, head: Head) -> bool:
    """Whether embedding and head may be units of their own: no other module has their weights, and none reads the embedding's."""
    embedding, linear = model.get_input_embeddings(), head.linear
    mine = {id(each) for end in (embedding, linear) for each in end.parameters()}
    ends = {id(each) for end in (embedding, linear) for each in end.modules()}
    for module in model.modules():
        if id(module) not in ends and mine & {id(each) for each in module.parameters(recurse=False)}:
            return False
    weight = embedding.weight
    data = weight.data
    # there while the embedding computes alone, as in shards
    handles = [
        embedding.register_forward_pre_hook(lambda *_: setattr(weight, "data", data)),
        embedding.register_forward_hook(lambda *_: setattr(weight, "data", data[:0])),
    ]
    weight.data = data[:0]
    try:
        decoder_of(model)(input_ids=torch.ones(1, 2, dtype=torch.int64, device=data.device), use_cache=False)
    # its own code may raise anything
    except Exception as error:
        log.debug("the embedding is no unit of its own: %s", one_line(error, 200))
        return False
    finally:
        weight.data = data
        for handle in handles:
            handle.remove()
    return True


def _shard_ends(model: Any, head: Head, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> Head:
    """Make units of the embedding and the head; returns the head that computes in its unit."""
    embedding, linear = model.get_input_embeddings(), cast(Any, head.linear)
    tied = linear.weight is embedding.weight
    for unit in [[embedding, linear]] if tied else [[embedding], [linear]]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if tied:
        embedding.register_forward_hook(lambda *_: embedding.reshard())
    linear.forward = head.logps
    return ShardedHead(linear, head.scale, head.cap, tied)


def _mesh(parallel: str, world: World) -> DeviceMesh:
    if parallel == "fsdp":
        return init_device_mesh(world.device.type, (world.size,))
    local = world.local_size
    if world.size % local:
        raise ConfigError(
            f"--parallel hybrid: expected as many processes on every node, got {world.size} in all, {local} here"
        )
    names = ("nodes", "shards")
    mesh = init_device_mesh(world.device.type, (world.size // local, local), mesh_dim_names=names)
    for name in names:
        # torch gives groups that it splits from another 30 minutes
        _set_pg_timeout(STEP, mesh.get_group(name))
    return mesh


def _describe(model: nn.Module | None, dtype: str) -> dict[str, Any]:
    """All that the other ranks need to build the same modules without weights. The model is held for passes in `dtype`."""
    assert model is not None
    model = hold_for(model, torch.device("cpu"), dtype)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = probed(model)
    return {
        "class": type(base),
        "config": base.config,
        "adapter": model.peft_config["default"] if base is not model else None,  # type: ignore[index]
        "base_fingerprint": getattr(model, "base_fingerprint", None),
        "head_is_own": head is not None,
        "ends_apart": head is not None and _may_part(model, head),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "precision": {name: parameter.dtype for name, parameter in model.named_parameters()},
    }


def _skeleton(plan: dict[str, Any]) -> nn.Module:
    """The same modules on the device `meta`, with shapes and names but without memory."""
    with torch.device("meta"):
        model: nn.Module = plan["class"](plan["config"]).to(torch.float32)
        if adapter := plan["adapter"]:
            model = adapt(model, adapter, adapter.base_model_name_or_path)
            model.base_fingerprint = plan["base_fingerprint"]
    trained = set(plan["trained"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.data = parameter.data.to(plan["precision"][name])
    look_up_in_float32(model)
    return model


def _fill(skeleton: nn.Module, model: nn.Module | None, world: World) -> None:
    """Copy rank 0's weights and buffers into the shards of all ranks, a tensor at a time."""
    whole = {} if model is None else model.state_dict()
    set_model_state_dict(skeleton, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    mine = {} if model is None else dict(model.named_buffers())
    # also the buffers that no state dict holds, such as rotary frequencies
    for name, buffer in skeleton.named_buffers():
        if name in mine:
            buffer.copy_(mine[name])
        dist.broadcast(buffer, src=0)
