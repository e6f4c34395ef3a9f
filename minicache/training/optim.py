"""The optimizers that options/catalog.py names."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from minicache.errors import ConfigError
from minicache.options.catalog import OPTIMIZERS, WEIGHTS, code_of
from minicache.processes.world import World
from minicache.text import one_line

log = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """AdamW in one fused kernel per step. Source: Loshchilov & Hutter, arXiv:1711.05101."""
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def adamw_8bit(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """AdamW with its state in 8 bits. Source: Dettmers et al. 2022, 8-bit Optimizers, arXiv:2110.02861."""
    return _from_bitsandbytes("AdamW8bit", groups, lr)


def paged_adamw_8bit(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """`adamw_8bit` with its state in memory that CUDA moves to the CPU and back."""
    return _from_bitsandbytes("PagedAdamW8bit", groups, lr)


def _from_bitsandbytes(name: str, groups: Groups, lr: float) -> torch.optim.Optimizer:
    # By name: the library is untyped, and not installed everywhere.
    made: torch.optim.Optimizer = getattr(import_module("bitsandbytes.optim"), name)(groups, lr=lr)
    return made


def rounding_adamw(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """AdamW with its state in 8 bits, whose result is rounded to bfloat16 up or down, by chance, so that the mean is exact.

    Weights in float32 are updated as usual. Within `rounding_of` the chance is the same on all ranks and after --resume.
    Source: Zamirai et al. 2020, Revisiting BFloat16 Training, arXiv:2010.06192; the state is that of `adamw_8bit`.
    """
    made: torch.optim.Optimizer = _torchao().AdamW8bit(groups, lr=lr, bf16_stochastic_round=True)
    return made


def adamw_on_cpu(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """AdamW with its state and its update in the CPU's memory. Source: Ren et al. 2021, ZeRO-Offload, arXiv:2101.06840.

    A copy of the weights and the gradients lies there too. Small weights are updated on the device. The device keeps its gradients:
    they are accumulated, and clipped when all are known.
    """
    made: torch.optim.Optimizer = _torchao().CPUOffloadOptimizer(groups, torch.optim.AdamW, lr=lr)
    return made


def rounding_adamw_on_cpu(groups: Groups, lr: float) -> torch.optim.Optimizer:
    """`rounding_adamw` in the CPU's memory, as `adamw_on_cpu`."""
    library = _torchao()
    made: torch.optim.Optimizer = library.CPUOffloadOptimizer(
        groups, library.AdamW8bit, lr=lr, bf16_stochastic_round=True
    )
    return made


def _torchao() -> Any:
    """The library's optimizers. By this import torch can also read their state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("torchao.optim")


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Let the optimizer go on from this state. Raises ValueError, KeyError, TypeError, AttributeError: it is of another one."""
    if getattr(optimizer, "is_paged", False):
        _load_into_pages(optimizer, state)
        return
    optimizer.load_state_dict(state)
    inner = getattr(optimizer, "d_opt", None)
    if isinstance(inner, torch.optim.Optimizer):
        # torchao's shows the groups from before, of which no step reads the learning rate any more
        vars(optimizer)["d_param_groups"] = inner.param_groups


def _load_into_pages(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the state of `paged_adamw_8bit`: bitsandbytes itself would read it into the device's own memory, and leave it there."""
    optimizer.load_state_dict(state, move_to_device=False)
    for parameter, held in optimizer.state.items():
        for name in ("state1", "state2"):
            if held[name].shape != parameter.shape:
                raise ValueError(f"{name}: expected the shape {tuple(parameter.shape)}, got {tuple(held[name].shape)}")
            held[name] = optimizer.get_state_buffer(parameter, dtype=held[name].dtype).copy_(held[name])


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step take this learning rate. torchao's optimizers hold it as a tensor, so that they compile once."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@contextmanager
def rounding_of(seed: int, step: int, fuses: bool = False) -> Iterator[None]:
    """Within it the chance of `rounding_adamw` is a function of seed and step alone.

    fuses: the library compiles its update; see `can_fuse`. Else it runs as it is written.
    """
    digest = blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
    with torch.compiler.set_stance("default" if fuses else "force_eager"):
        yield


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether the update can be compiled here, by trial: on a GPU, with Triton and the compilers for what lies beside it.

    Triton needs a C compiler for each kernel's start. The step and the learning rate, and all of an update in the CPU's memory,
    need a C++ compiler.
    """
    if device.type != "cuda" or not has_triton():
        return False
    try:
        torch.compile(_trial, fullgraph=True, dynamic=False)(torch.ones(8, device=device), torch.ones(8))
    # a compiler that is missing, or lacks headers, has no error of its own
    except Exception as error:
        log.debug("torch compiles nothing here: %s", one_line(error, 300))
        return False
    return True


def agreed_fusing(weights: str, world: World, note: Callable[[str], None]) -> bool:
    """Whether the update is compiled: by all processes or by none, whose chance must be the same. weights: their precision."""
    if weights == "float32":
        return False
    fuses = all(world.together(lambda: can_fuse(world.device)))
    if world.device.type == "cuda" and not fuses:
        note(
            f"--weights {weights}: the update runs uncompiled, which is slow: torch compiles nothing here; expected Triton, a C "
            "and a C++ compiler"
        )
    return fuses


def _trial(weights: torch.Tensor, beside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights * 2 + 1, beside * 2 + 1


def clip(optimizer: torch.optim.Optimizer, most: float) -> torch.Tensor:
    """Scale the gradients so that their norm is at most this; returns the norm before, float32, as a tensor."""
    if stream := getattr(optimizer, "stream", None):
        # on which torchao copies gradients to the CPU; what it then updates, and what its groups hold, are those
        stream.synchronize()
        for parameter, copied in optimizer.param_d2h_map.items():  # type: ignore[attr-defined]
            if parameter not in optimizer.queue:  # type: ignore[attr-defined]
                # no gradient came in this step; there lies an earlier one, or what memory held before
                copied.grad.zero_()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    gradients = [each.grad for each in parameters if each.grad is not None]
    if all(each.dtype == torch.float32 for each in gradients):
        found: torch.Tensor = torch.nn.utils.clip_grad_norm_(parameters, most)
        return found
    # torch's own would round the norm of each to its precision
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32).to(gradients[0].device) for each in gradients]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def require_optimizer(name: str, weights: str, device: torch.device) -> None:
    """Raises ConfigError: the optimizer's library is not installed, or has nothing for this kind of device."""
    entry = WEIGHTS[weights][name]
    if entry.package and find_spec(entry.package) is None:
        option = f"--optimizer {name}" if weights == "float32" else f"--weights {weights}"
        raise ConfigError(f"{option}: needs another package: pip install 'minidpo[{entry.extra}]'")
    if entry.package == "torchao":
        _torchao()
    if entry.package == "bitsandbytes" and device.type not in ("cpu", "cuda", "xpu"):
        raise ConfigError(f"--optimizer {name}: bitsandbytes has none for {device.type}; expected adamw")
    if entry.gpu_only and device.type != "cuda":
        others = " or ".join(each for each, one in OPTIMIZERS.items() if not one.gpu_only)
        raise ConfigError(f"--optimizer {name}: frees a GPU's memory, and there is no GPU; expected {others}")


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, weights: str = "float32", decay_norms: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of this name for the trainable parameters, with betas 0.9 and 0.999.

    weights: their precision, a name in WEIGHTS. decay_norms: weight decay acts on norms and biases too, not on matrices only.
    `require_optimizer` checks what the optimizer needs.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {
            "params": [parameter for parameter in parameters if parameter.ndim < 2],
            "weight_decay": weight_decay if decay_norms else 0.0,
        },
    ]
    made: torch.optim.Optimizer = code_of(WEIGHTS[weights][name])([group for group in groups if group["params"]], lr)
    return made
