"""The bytes of tensors that live, counted as operations make them."""

import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from minicache.scoring.kernels import Spans

DEVICE = torch.ops.prim.device.default


class Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and still live, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):
            # of every hundred operations sixty: autograd's engine asks for the device of all that it passes on
            return args[0].fake_device
        result = _run(func, args, kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Spans):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def know(self, module: nn.Module) -> None:
        """Take the module's tensors and their gradients as made before."""
        for tensor in [*module.parameters(), *module.buffers()]:
            for each in (tensor, tensor.grad):
                if each is not None:
                    self._sizes[each.untyped_storage()._cdata] = 0

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation; without content, that of a grouped product (experts), of which torch knows bfloat16 alone."""
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16 and hasattr(args[0], "fake_mode"):
        halves = tree_map_only(torch.Tensor, lambda each: each.bfloat16() if each.is_floating_point() else each, args)
        return func(*halves, **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)
