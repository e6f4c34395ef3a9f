"""Creating a reference cache and writing blocks into it.

Crash safety: the data of a block first, flushed to disk, its ledger row last. A block whose row is absent or does not fit
its data is simply not done, so a kill at any instant costs at most the blocks in flight. The processes of a run may write different
blocks at the same time without locks; only one of them creates, grows, and writes the log, and holds off other runs.
"""

import secrets
import shutil
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from minicache.cache.claims import CLAIM_FILE, SHARD_CLAIMS
from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import Manifest, RefBlock, array_specs, pairs_row, ref_row
from minicache.disk import flush_to_disk, with_folders, writing
from minicache.errors import OutputError
from minicache.pairs import PairTable


class CacheWriter(ReferenceCache):
    """A cache on disk, open for writing."""

    mode = "r+"

    @classmethod
    def create(cls, path: Path, manifest: Manifest, write_tokenizer: Callable[[Path], object]) -> "CacheWriter":
        """Make an empty cache. It appears at `path` complete or not at all; `write_tokenizer` fills its tokenizer directory.

        Raises:
            OutputError: something else lies at `path`, or it cannot be written.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.samefile(Path.cwd())):
            raise OutputError(f"{path}: exists and is no reference cache; name another --ref-cache or remove it")
        place = path.resolve()  # what a link leads to
        draft = _draft_of(place)
        try:
            with writing(path):
                draft.parent.mkdir(parents=True, exist_ok=True)
                group = zarr.create_group(zarr.storage.LocalStore(draft), attributes=manifest.to_attributes())
                for name, spec in array_specs(manifest.identity).items():
                    group.create_array(
                        name,
                        shape=(0, *spec.shape),
                        dtype=spec.dtype,
                        chunks=spec.chunks,
                        fill_value=spec.fill,
                        compressors=[*([ZstdCodec(level=3)] if spec.compress else []), Crc32cCodec()],
                    )
                write_tokenizer(draft / "tokenizer")
                (draft / CLAIM_FILE).touch()
                flush_to_disk(draft.rglob("*"))
                draft.replace(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        # Of attempts that were killed. One that another process is at just now cannot come to anything any more.
        for leftover in place.parent.glob(f".{escape(place.name)}.creating-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return cls(path)

    def remove(self) -> None:
        """Take the cache away: gone from its place at once, so that nobody meets half of it."""
        place = self.path.resolve()
        dead = _draft_of(place)
        try:
            place.replace(dead)
        except OSError:  # its folder cannot be written to
            dead = place
        shutil.rmtree(dead, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete what writers that were killed left half-written. Only while no other process writes."""
        self._unlink([*self.path.rglob("*.partial"), *self.path.glob(f"{SHARD_CLAIMS}*")])

    def remove_leftovers_of(self, blocks: Iterable[int]) -> None:
        """The same of some blocks alone. Only while no other process writes these."""
        places = [self.path / name / "c" / str(block) for block in blocks for name in self.specs]
        self._unlink([leftover for place in places for leftover in place.rglob("*.partial")])

    def _unlink(self, files: list[Path]) -> None:
        with writing(self.path):
            for file in files:
                file.unlink(missing_ok=True)

    def grow(self, blocks: int) -> None:
        """Make room for `blocks` blocks. The ledger of pairs grows last: what it has room for, every array has."""
        self._resize([name for name, array in self._others() if array.shape[0] < blocks], blocks)
        if self.blocks < blocks:
            self._resize(["ledger/pairs"], blocks)

    def shrink(self, blocks: int) -> None:
        """Take back blocks from the end: what a call that failed had added. The ledger of pairs shrinks first."""
        if self.blocks > blocks:
            self._resize(["ledger/pairs"], blocks)
        self._resize([name for name, array in self._others() if array.shape[0] > blocks], blocks)

    def _others(self) -> list[tuple[str, zarr.Array]]:
        return [(name, array) for name, array in self.arrays.items() if name != "ledger/pairs"]

    def _resize(self, names: list[str], blocks: int) -> None:
        with writing(self.path):
            for name in names:
                self.arrays[name].resize((blocks, *self.arrays[name].shape[1:]))
            flush_to_disk([self.path / name / "zarr.json" for name in names])

    def write_log(self) -> None:
        with writing(self.path):
            self.group.attrs.put(self.manifest.to_attributes())
            flush_to_disk(with_folders([self.path / "zarr.json"]))

    def write_pairs(self, block: int, table: PairTable) -> None:
        self._commit(
            "ledger/pairs",
            block,
            pairs_row(self.identity, table),
            {
                "pairs/tokens": table.tokens,
                "pairs/loss_mask": table.loss_mask,
                "pairs/lengths": table.lengths,
                "pairs/digest": table.digest,
                "pairs/source": table.source,
            },
        )

    def write_ref(self, block: int, scores: RefBlock) -> None:
        """Store a block's scores. All mean logprobs must be finite."""
        assert np.isfinite(scores.logp_mean).all(), "non-finite scores must be refused before they are written"
        columns = {"ref/logp_mean": scores.logp_mean, "ref/token_count": scores.token_count}
        if self.identity.per_token:
            assert scores.token_logps is not None
            columns["ref/token_logps"] = scores.token_logps
        row = ref_row(self.identity, scores, self._ledger_row("ledger/pairs", block))
        self._commit("ledger/ref", block, row, columns)

    def _commit(self, ledger: str, block: int, row: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        with writing(self.path):
            written = [file for name, values in columns.items() for file in self._write(name, block, values)]
            flush_to_disk(with_folders(written))
            self.arrays[ledger][block] = row
            flush_to_disk(with_folders([self._chunk_file(ledger, block, 0)]))

    def _write(self, name: str, block: int, values: np.ndarray) -> list[Path]:
        """Write whole chunks, padded with the fill value, so that nothing is read and no other block is touched."""
        spec = self.specs[name]
        chunks = -(-len(values) // spec.chunk)
        padded = np.full((chunks * spec.chunk, *spec.shape[1:]), spec.fill, spec.dtype)
        padded[: len(values)] = values
        self.arrays[name][block, : len(padded)] = padded
        files = [self._chunk_file(name, block, chunk) for chunk in range(chunks)]
        return [file for file in files if file.exists()]  # a chunk of nothing but NaN is not stored


def _draft_of(place: Path) -> Path:
    """A name of its own beside `place`: zarr's threads may still be writing into that of an attempt that failed."""
    return place.with_name(f".{place.name}.creating-{secrets.token_hex(4)}")
