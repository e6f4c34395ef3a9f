"""Reading the index of an optimizer's distributed checkpoint without executing what it contains.

torch stores the index as a pickle, `.metadata`, and reads it by `pickle.load`, which executes code that a stranger put there. Here
only the names of torch's own index are accepted. They build nodes without behaviour, and torch's objects are made from the
nodes after every entry has been checked.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from minicache.disk import require_file
from minicache.strict import shortened

INDEX = ".metadata"
MOST_BYTES = 2**28  # a thousand times those of a model of 32 layers
MOST_CHUNKS = 2**22
SHARDS = re.compile(r"__\d+_\d+\.distcp")
CLASSES = "torch.distributed.checkpoint.metadata"
# Replacements for names of torch 2.11 to 2.13 other than the classes below: sizes, an enum's number, a layout.
# They do not look into their arguments: a tuple of tuples of tuples may be short in a pickle and endless as text.
PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): tuple,
    (CLASSES, "_MEM_FORMAT_ENCODING"): lambda number: number,
    ("torch.serialization", "_get_layout"): lambda name: name,
}
PATHS = {("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
NODES = {
    *((CLASSES, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    *((CLASSES, name) for name in ("MetadataIndex", "StorageMeta")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
Kind = TypeVar("Kind")


class _Node:
    """An object of the index as plain data: its class's name and its state."""

    name, state = "", None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Builds nothing but nodes, plain values and torch's dtypes.

    It is the one in Python: that in C takes 16 bytes for each number up to the largest one that the pickle gives to an object.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NODES:
            # A new class each time: a pickle can change its classes, but not those of the next reading.
            return type(name, (_Node,), {"name": name})
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if (module, name) in PATHS:
            # The path where the checkpoint was written; not needed.
            return lambda *parts: None
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"expected the names of torch's own index, got {module}.{name}")


class IndexedReader(FileSystemReader):
    """torch's reader of the shards in a folder, with an index read by `read_index`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.index = read_index(folder / INDEX)
        for name in {place.relative_path for place in self.index.storage_data.values()}:
            require_file(folder / name)

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        return self.index


def read_index(file: Path) -> Metadata:
    """The index of a checkpoint that holds only tensors, in files beside it.

    Raises:
        OSError: it cannot be read. ValueError: it is no index, or has entries that `checkpoints` never writes.
    """
    require_file(file)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{INDEX}: {size:,} bytes, expected {MOST_BYTES:,} or fewer")
    with file.open("rb") as stream:
        try:
            return _metadata(_Unpickler(stream).load())
        except OSError:
            raise
        # Damaged bytes make an unpickler raise nearly every kind of exception.
        except Exception as error:
            raise ValueError(f"{INDEX}: {error or type(error).__name__}") from error


def _metadata(root: object) -> Metadata:
    state = _state(root, "Metadata")
    version = state.get("version")
    # a list that many entries share is short in a pickle
    chunks = sum(
        len(_is(list, _state(each, "TensorStorageMetadata")["chunks"]))
        for each in state["state_dict_metadata"].values()
    )
    if chunks > MOST_CHUNKS:
        raise ValueError(f"expected {MOST_CHUNKS:,} shards or fewer, got {chunks:,}")
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
    """The properties of a tensor. Their state is a tuple with the dtype first; the rest is equal in all our checkpoints."""
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
        raise ValueError("expected shards stored as they are, got transformed ones")
    return _StorageInfo(relative_path=name, offset=_size((state["offset"],))[0], length=_size((state["length"],))[0])


def _state(node: object, name: str) -> dict[str, Any]:
    """The attributes of a node. Raises ValueError: it does not stand for the class of that name."""
    if not isinstance(node, _Node) or node.name != name:
        got = node.name if isinstance(node, _Node) else type(node).__name__
        raise ValueError(f"expected {name}, got {got}")
    return _is(dict, node.state)


def _size(value: object) -> torch.Size:
    sizes = _is(tuple, value)
    if not all(type(each) is int and 0 <= each < 2**63 for each in sizes):
        raise ValueError(f"expected sizes from 0, got {shortened(sizes)}")
    return torch.Size(sizes)


def _is(kind: type[Kind], value: object) -> Kind:
    """The value, if it is of this kind. Raises ValueError."""
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value
