"""A device that computes on the CPU and, while it is watched, raises wherever a GPU would make the host wait.

It is torch's PrivateUse1 device, which can be registered once in a process and stays: a test starts a process for it. Each of its
tensors wraps one of the CPU. A copy between host and device is made by the host, so a GPU waits for nothing only if the copy is to
the device, from page-locked memory, and asked for as non_blocking.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# Their sizes depend on values only if a mask is among the indices.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_watched = [False]
# What other threads would wait for; autograd's ends the process if an error is raised in it.
_elsewhere: list[str] = []
_registered: list[torch.library.Library] = []


class Waited(Exception):
    """A host would have waited for its GPU."""


class OnDevice(torch.Tensor):
    """A tensor on the device. raw: its content, on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Self:
        """The tensor around this content."""
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    def tolist(self) -> Any:
        """The values, which torch does not list for a subclass."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Within this context tensors can be made on the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Module(_DummyBackendModule):
    """What torch asks of a backend that has autocast."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """The device; once in a process. Memory that is pinned from here on is only marked so."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign, assignment]
    key = "AutocastPrivateUse1"
    _registered.append(torch.library.Library("_", "IMPL", key))
    _registered[-1].fallback(torch.library.fallthrough_kernel)
    _registered.append(torch.library.Library("aten", "IMPL", key))
    for name in ("linear", "matmul", "scaled_dot_product_attention"):
        _registered[-1].impl(name, partial(_autocast, getattr(aten, name).default))
    return torch.device(NAME, 0)


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Waited` in this context for whatever would wait, or at its end for what a thread of autograd waited for."""
    _watched[0] = True
    _elsewhere.clear()
    try:
        yield
    finally:
        _watched[0] = False
    if _elsewhere:
        raise Waited(_elsewhere[0])


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    pinned = tensor.clone()
    pinned.is_page_locked = True  # type: ignore[attr-defined]
    return pinned


def _autocast(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation in the precision of autocast."""

    def cast(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(torch.get_autocast_dtype(NAME)) if half else value

    with torch.autocast(NAME, enabled=False):
        return func(*tree_map(cast, args), **tree_map(cast, kwargs))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, on the device if one of its arguments or `device` is."""
    given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    to = kwargs.get("device")
    there = any(isinstance(each, OnDevice) for each in given) if to is None else torch.device(to).type == NAME
    if _watched[0] and (there or any(isinstance(each, OnDevice) for each in given)):
        _refuse_waits(func, args, kwargs, given, there)
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    return (
        tree_map(lambda each: OnDevice(each) if isinstance(each, torch.Tensor) else each, result) if there else result
    )


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, OnDevice) else value


def _refuse(text: str) -> None:
    if threading.current_thread() is threading.main_thread():
        raise Waited(text)
    _elsewhere.append(text)


def _refuse_waits(func: Any, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor], there: bool) -> None:
    """Raises Waited: on a GPU the host would wait for this operation."""
    sized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
    if TAGS.intersection(func.tags) and not sized and func not in INDEXED:
        _refuse(f"{func}: the host reads what the device computed")
    if func in INDEXED and any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]):
        _refuse(f"{func}: the host counts the entries of a mask")
    if func in COPIES:
        source = args[0] if func is aten._to_copy.default else args[1]
        target_there = there if func is aten._to_copy.default else isinstance(args[0], OnDevice)
        if isinstance(source, OnDevice) and not target_there:
            _refuse(f"{func}: a copy from the device")
        asynchronous = kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
        if (
            target_there
            and not isinstance(source, OnDevice)
            and not (asynchronous and hasattr(source, "is_page_locked"))
        ):
            _refuse(f"{func}: a copy to the device that is blocking, or not from page-locked memory")
    # an operation reads a number of the CPU when it is launched
    elif any(not isinstance(each, OnDevice) and each.ndim for each in given):
        _refuse(f"{func}: a tensor of the CPU among those of the device")
