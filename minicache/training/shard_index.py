"""The index of an optimizer's distributed checkpoint, read without running anything that it says.

torch keeps the index as a pickle, `.metadata`, and reads it by `pickle.load`, which runs whatever a stranger put there. Here every
name in it but those of torch's own index stands for nothing, what they build are values without behaviour, and torch's
objects are made of these once each is what it should be.
"""

import pickle
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX = ".metadata"
SHARDS = re.compile(r"__\d+_\d+\.distcp")
CLASSES = "torch.distributed.checkpoint.metadata"
# What stands for a name of torch 2.11 to 2.13 beside the classes below: sizes, an enum's number, a layout.
PLAIN = {
    ("torch", "Size"): tuple,
    (CLASSES, "_MEM_FORMAT_ENCODING"): int,
    ("torch.serialization", "_get_layout"): str,
}
PATHS = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
NODES = {
    *((CLASSES, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    *((CLASSES, name) for name in ("MetadataIndex", "StorageMeta")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
Kind = TypeVar("Kind")


class _Node:
    """Stands for an object of the index: its state, and nothing that acts."""

    name, state = "", None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds nothing but nodes, plain values and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NODES:
            # of its own in each reading: nothing that is built can change what the next is built of
            return type(name, (_Node,), {"name": name})
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if (module, name) in PATHS:
            # where the checkpoint was written, which is of no use
            return lambda *parts: None
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"expected the names of torch's own index, got {module}.{name}")


class IndexedReader(FileSystemReader):
    """torch's reader of the shards in a folder, with an index that was read before."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_index(folder / INDEX)

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        return self.index


def read_index(file: Path) -> Metadata:
    """The index of a checkpoint that holds tensors alone, in files beside it.

    Raises:
        OSError: it cannot be read. ValueError: it is none, or names what a checkpoint of ours never has.
    """
    with file.open("rb") as stream:
        try:
            return _metadata(_Unpickler(stream).load())
        except OSError:
            raise
        # of damaged bytes an unpickler raises nearly everything
        except Exception as error:
            raise ValueError(f"{INDEX}: {error or type(error).__name__}") from error


def _metadata(root: object) -> Metadata:
    state = _state(root, "Metadata")
    version = state.get("version")
    return Metadata(
        state_dict_metadata={
            _is(str, name): _tensor(entry) for name, entry in _is(dict, state["state_dict_metadata"]).items()
        },
        planner_data={},
        storage_data={_key(key): _place(info) for key, info in _is(dict, state["storage_data"]).items()},
        storage_meta=StorageMeta(),
        version=None if version is None else _is(str, version),
    )


def _tensor(entry: object) -> TensorStorageMetadata:
    state = _state(entry, "TensorStorageMetadata")
    chunks: list[dict[str, Any]] = [_state(chunk, "ChunkStorageMetadata") for chunk in _is(list, state["chunks"])]
    return TensorStorageMetadata(
        properties=_properties(state["properties"]),
        size=_size(state["size"]),
        chunks=[ChunkStorageMetadata(offsets=_size(chunk["offsets"]), sizes=_size(chunk["sizes"])) for chunk in chunks],
    )


def _properties(node: object) -> TensorProperties:
    """Those of the class keep their state as a tuple, the dtype first; the others are the same for all of ours."""
    if not isinstance(node, _Node) or node.name != "TensorProperties":
        raise ValueError("expected TensorProperties")
    return TensorProperties(dtype=_is(torch.dtype, _is(tuple, node.state)[0]))


def _key(key: object) -> MetadataIndex:
    state = _state(key, "MetadataIndex")
    offset, index = state.get("offset"), state.get("index")
    return MetadataIndex(
        _is(str, state["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _is(int, index),
    )


def _place(info: object) -> _StorageInfo:
    state = _state(info, "_StorageInfo")
    name = _is(str, state["relative_path"])
    if not SHARDS.fullmatch(name):
        raise ValueError(f"expected a file like __0_0.distcp beside the index, got {name[:80]!r}")
    if state.keys() - {"relative_path", "offset", "length"}:
        raise ValueError("expected shards as they are, got some to be transformed")
    return _StorageInfo(relative_path=name, offset=_size((state["offset"],))[0], length=_size((state["length"],))[0])


def _state(node: object, name: str) -> dict[str, Any]:
    """The attributes of a node for the class of that name."""
    if not isinstance(node, _Node) or node.name != name:
        got = node.name if isinstance(node, _Node) else type(node).__name__
        raise ValueError(f"expected {name}, got {got}")
    return _is(dict, node.state)


def _size(value: object) -> torch.Size:
    sizes = _is(tuple, value)
    if not all(type(each) is int and 0 <= each < 2**63 for each in sizes):
        raise ValueError(f"expected sizes from 0, got {str(sizes)[:80]}")
    return torch.Size(sizes)


def _is(kind: type[Kind], value: object) -> Kind:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
