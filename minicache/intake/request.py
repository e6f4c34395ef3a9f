"""The request of a call of stage one, and the cache that it describes: identity, tokenizer, files."""

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from minicache import __version__
from minicache.cache.blocks import Blocks
from minicache.cache.identity import FORMAT_VERSION, Identity
from minicache.cache.manifest import Log, Manifest, now
from minicache.cache.places.opening import place_at
from minicache.cache.places.place import Place
from minicache.data.arguments import parse_arguments
from minicache.data.files import DataFile
from minicache.data.template import require_read
from minicache.data.tokenizers import PLAIN_TEMPLATE, ChatTokenizer
from minicache.errors import DataError
from minicache.intake.blocks import hash_files
from minicache.intake.tokenizer_files import template_digest
from minicache.models import LoadedModel, save_tokenizer
from minicache.models.load import lasting_name
from minicache.models.quantized import weight_count
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.where import Where
from minicache.processes.devices import by_kind
from minicache.trackers import Tracker

# Seconds to score a block: a kill costs about as much.
BLOCK_SECONDS = 60
# FLOP/s, a conservative guess; only the size of a block depends on it.
ASSUMED_FLOPS = {"cpu": 5e10, "cuda": 1e14}


@dataclass(frozen=True)
class Request:
    """The request of a call. tokenizer_dir: the tokenizer's files as the cache will hold them. files: by sha256."""

    config: PrecomputeConfig
    identity: Identity
    tokenizer: ChatTokenizer
    tokenizer_dir: Path
    files: dict[str, DataFile]
    tracker: Tracker

    @property
    def place(self) -> Place:
        return place_at(self.config.ref_cache)

    @property
    def path(self) -> Where:
        return self.place.where

    @classmethod
    def of(
        cls,
        config: PrecomputeConfig,
        files: list[DataFile],
        loaded: LoadedModel,
        device: torch.device,
        tracker: Tracker,
        scratch: Path,
    ) -> "Request":
        """The request for these options, files and reference.

        config: with a settled dtype. scratch: a directory for the tokenizer's files.
        """
        tokenizer_dir = scratch / "tokenizer"
        tokenizer = _tokenizer(config, loaded.family, tokenizer_dir)
        if tokenizer.template == PLAIN_TEMPLATE and not config.chat_template:
            tracker.note(
                f"{config.tokenizer or config.model}: the tokenizer has no chat template; turns are written plainly, as "
                "'User: …' and 'Assistant: …'; --chat-template FILE gives another form"
            )
        return cls(
            config=config,
            identity=_identity(config, loaded, tokenizer, device),
            tokenizer=tokenizer,
            tokenizer_dir=tokenizer_dir,
            files=hash_files(files),
            tracker=tracker,
        )

    @property
    def manifest(self) -> Manifest:
        """The manifest of a new, empty cache for this request."""
        return Manifest(self.identity, Log(model=lasting_name(self.config.model), created=now(), versions=_versions()))

    def require_same(self, blocks: Blocks) -> None:
        """Raises CacheMismatch: the cache has another identity. Any size of a block will do, unless one is asked for."""
        block_pairs = self.config.block_pairs or blocks.identity.block_pairs
        blocks.identity.require(
            replace(self.identity, block_pairs=block_pairs),
            f"{self.path}: made for another request",
            ("the cache", "asked for"),
            "Ask for the same, or name another --ref-cache",
        )


def _tokenizer(config: PrecomputeConfig, family: str, directory: Path) -> ChatTokenizer:
    """The tokenizer with the chat template asked for; its files are written to `directory`."""
    template = None
    if config.chat_template:
        try:
            template = config.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat-template {config.chat_template}: cannot be read: {error}") from error
    save_tokenizer(config.tokenizer or config.model, directory, template, config.trust_remote_code, family)
    tokenizer = ChatTokenizer.load(directory)
    require_read(tokenizer.chat, config.date, parse_arguments(config.template_arg))
    # A policy should be prompted with the template that it was trained with, so the template stays with the tokenizer.
    (directory / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8", newline="\n")
    return tokenizer


def _identity(
    config: PrecomputeConfig, loaded: LoadedModel, tokenizer: ChatTokenizer, device: torch.device
) -> Identity:
    return Identity(
        format_version=FORMAT_VERSION,
        weights=loaded.fingerprint,
        family=loaded.family,
        tokenizer=tokenizer.digest,
        template=template_digest(tokenizer),
        vocabulary=loaded.vocabulary,
        max_length=config.max_length,
        truncate=config.truncate,
        loss_on=config.loss_on,
        think=config.think,
        dtype=config.dtype,
        attention=loaded.attention,
        block_pairs=config.block_pairs or _block_pairs(loaded, config.max_length, device),
        per_token=config.per_token,
        special_text=config.special_text,
        date=config.date,
        template_args=parse_arguments(config.template_arg),
        quantization=loaded.quantization,
    )


def _block_pairs(loaded: LoadedModel, max_length: int, device: torch.device) -> int:
    """The number of pairs that take about BLOCK_SECONDS to score: a power of two from 16 to 4096."""
    parameters = sum(map(weight_count, loaded.model.parameters()))
    seconds_a_pair = 2 * parameters * min(max_length, 512) / by_kind(ASSUMED_FLOPS, device)
    return 1 << int(np.clip(np.log2(BLOCK_SECONDS / seconds_a_pair), 4, 12))


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "zarr", "numpy")
    ours = {"minicache": __version__, "python": platform.python_version()}
    return {**ours, **{package: version(package) for package in packages}}
