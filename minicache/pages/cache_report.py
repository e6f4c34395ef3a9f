"""The data of a cache's page: the inspection, which answers the reference prefers, rows to look at, texts. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache.cache.reader import ReferenceCache
from minicache.cache.refusals import read_refusals
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheDamaged, MinicacheError
from minicache.pairs import CHOSEN, REJECTED, PairTable
from minicache.reports import suspects
from minicache.reports.columns import Columns, extreme, pair_lines
from minicache.reports.contents import ReadCache
from minicache.reports.inspection import Inspection, PairLine
from minicache.reports.pair_text import Piece, pair_texts
from minicache.text import phrase
from minicache.trackers import Tracker

EXTREMES = 5  # pairs in a list of extreme ones
LISTED = 50  # rows in a list of suspects
TEXTS_OF_LIST, TEXTS = 8, 48  # pairs with their text on the page: of one list of suspects, of all lists
MOST_TOKENS = 1_000_000_000  # stored tokens searched for suspects: a minute or two
FLIPPED = "margin {margin:+.2f}, {z:.1f} robust standard deviations below the median"
MOST_FILES = 100  # files in the tables by file


@dataclass(frozen=True)
class Group:
    """Scored pairs of one kind. by_mean, by_sum: share in which the reference prefers chosen; margin: the mean, nats per token."""

    name: str
    pairs: int
    by_mean: float
    by_sum: float
    margin: float


@dataclass(frozen=True)
class Suspect:
    """A row to look at, or two that belong together. note: what was found, in words."""

    lines: list[PairLine]
    note: str


@dataclass(frozen=True)
class Suspects:
    """Rows by rule. found: rule -> how many there are; rows: rule -> the first of them.

    damage: of each block whose tokens or scores are not what was written, its problem. unread: pairs not looked at.
    """

    found: dict[str, int]
    rows: dict[str, list[Suspect]]
    damage: list[str]
    unread: int


@dataclass(frozen=True)
class CacheReport:
    """groups: heading -> groups. extremes: heading -> pairs. texts: pair -> pieces; no_texts: why there are none.

    refusals: the lines of the list of refused rows as JSON, which a person may have edited.
    """

    inspection: Inspection
    groups: dict[str, list[Group]]
    extremes: dict[str, list[PairLine]]
    suspects: Suspects
    texts: dict[int, list[list[Piece]]]
    no_texts: str
    refusals: list[Any]

    def short_name(self, source: str) -> str:
        """The file's name without its folders, unless another file of the cache has the same name."""
        names = [Path(of["name"]).name for of in self.inspection.log["sources"]]
        name = Path(source).name
        return name if names.count(name) == 1 else source


def gather(read: ReadCache, tracker: Tracker) -> CacheReport:
    """The report on a cache, complete or not, damaged or not; its tokens are read here."""
    cache, columns = read.cache, read.columns
    margins = _margins(columns)
    extremes = {
        "Reference prefers chosen most": pair_lines(cache, columns, extreme(-margins, EXTREMES)),
        "Reference prefers rejected most": pair_lines(cache, columns, extreme(margins, EXTREMES)),
        "Least likely answers": pair_lines(cache, columns, extreme(columns.logp_mean.min(1, initial=np.inf), EXTREMES)),
        "Longest pairs": pair_lines(cache, columns, extreme(-columns.sides.max(1, initial=0), EXTREMES)),
    }
    found = _find_suspects(read, tracker)
    listed = [line for lines in extremes.values() for line in lines]
    listed += [line for rows in found.rows.values() for row in rows[:TEXTS_OF_LIST] for line in row.lines]
    texts, no_texts = _texts(cache, listed)
    return CacheReport(
        inspection=read.inspection,
        groups={
            "file": _by_source(cache, columns, margins),
            "longer answer": _by_length(columns, margins),
            "which answer is longer": _by_longer(columns, margins),
        },
        extremes=extremes,
        suspects=found,
        texts=texts,
        no_texts=no_texts,
        refusals=[line.value for line in read_refusals(cache.place)[:LISTED]],
    )


def _margins(columns: Columns) -> NDArray[np.float64]:
    """(N,) nats per token, NaN where not scored."""
    mean = columns.logp_mean.astype(np.float64)
    return np.where(columns.scored, mean[:, CHOSEN] - mean[:, REJECTED], np.nan)


def _texts(cache: ReferenceCache, lines: list[PairLine]) -> tuple[dict[int, list[list[Piece]]], str]:
    wanted = list(dict.fromkeys(line.index for line in lines if line.index is not None))[:TEXTS]
    try:
        return pair_texts(cache, ChatTokenizer.load(cache.tokenizer_dir), wanted), ""
    except MinicacheError as error:
        return {}, str(error)


# --- which answers the reference prefers ---


def _group(name: str, columns: Columns, margins: NDArray[np.float64], those: NDArray[np.bool_]) -> Group | None:
    those = those & columns.scored
    if not those.any():
        return None
    total = columns.logp_mean[those] * columns.counted[those]
    by_sum = float((total[:, CHOSEN] > total[:, REJECTED]).mean())
    return Group(
        name=name,
        pairs=int(those.sum()),
        by_mean=float((margins[those] > 0).mean()),
        by_sum=by_sum,
        margin=float(margins[those].mean()),
    )


def _by_source(cache: ReferenceCache, columns: Columns, margins: NDArray[np.float64]) -> list[Group]:
    names = [source.name for source in cache.log.sources][:MOST_FILES]
    found = [_group(name, columns, margins, columns.source[:, 0] == file) for file, name in enumerate(names)]
    return [group for group in found if group]


def _by_length(columns: Columns, margins: NDArray[np.float64]) -> list[Group]:
    """By the counted tokens of the longer answer, in powers of two."""
    longer = columns.counted.max(1, initial=1)
    found, low = [], 1
    for high in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 2**31):
        last = high >= 2**31
        name = phrase("{low:,} tokens and more" if last else "{low:,} to {high:,} tokens", low=low, high=high)
        found.append(_group(name, columns, margins, (longer >= low) & (longer <= high)))
        low = high + 1
    return [group for group in found if group]


def _by_longer(columns: Columns, margins: NDArray[np.float64]) -> list[Group]:
    more = columns.counted[:, CHOSEN] - columns.counted[:, REJECTED]
    kinds = {"chosen": more > 0, "rejected": more < 0, "neither": more == 0}
    found = [_group(phrase(name), columns, margins, those) for name, those in kinds.items()]
    return [group for group in found if group]


# --- rows to look at ---


def _find_suspects(read: ReadCache, tracker: Tracker) -> Suspects:
    cache, columns = read.cache, read.columns
    with_pairs = [block for block in range(len(cache.blocks)) if block not in read.without_pairs]
    looked, rows, damage, unread = _look(cache, with_pairs, tracker)
    margins = _margins(columns)
    z = suspects.robust_z(margins)

    def of(places: Any, note: str) -> Suspect:
        return Suspect(pair_lines(cache, columns, np.atleast_1d(places)), note)

    swapped = rows[suspects.contradicting(looked.sides)]
    alike = suspects.nearly_identical(looked.differing, columns.counted[rows])
    twins = suspects.near_duplicates(looked.sketch)
    flipped = suspects.perhaps_flipped(margins)
    counted = columns.counted[rows].max(1, initial=0)
    listed = {
        "contradicting": [of(both, phrase("the same two answers, the other way round")) for both in swapped[:LISTED]],
        "nearly-identical": [
            of(
                rows[at],
                phrase("{tokens} of {counted:,} differ", tokens=_tokens(looked.differing[at]), counted=counted[at]),
            )
            for at in alike[:LISTED]
        ],
        "near-duplicates": [
            of(rows[[one, other]], phrase("{score} of {hashes} hashes agree", score=score, hashes=suspects.SKETCH))
            for one, other, score in twins[:LISTED]
        ],
        "perhaps-flipped": [of(row, phrase(FLIPPED, margin=margins[row], z=-z[row])) for row in flipped[:LISTED]],
    }
    found = dict(zip(listed, (len(swapped), len(alike), len(twins), len(flipped)), strict=True))
    return Suspects(found, listed, damage, unread)


def _tokens(count: int) -> str:
    return phrase("1 token") if count == 1 else phrase("{count:,} tokens", count=count)


def _look(
    cache: ReferenceCache, blocks: list[int], tracker: Tracker
) -> tuple[suspects.Looked, NDArray[np.int64], list[str], int]:
    """What `suspects.look` found; the rows of the columns it is about; what is damaged; how many pairs were not read."""
    parts, rows, damage = [suspects.Looked.none()], [np.zeros(0, np.int64)], []
    sizes = np.array([cache.blocks.size(block) for block in blocks], np.int64).reshape(-1, 2)
    ends = sizes.cumsum(0)  # (blocks, 2) pairs and tokens up to the end of each
    tracker.begin("looking at the pairs", int(sizes[:, 0].sum()))
    few = [block for block, (_, read) in zip(blocks, ends.tolist(), strict=True) if read <= MOST_TOKENS]
    sound = []
    for at, (block, table) in enumerate(cache.blocks.each(cache.blocks.pairs, few)):
        pairs, tokens = sizes[at].tolist()
        if isinstance(table, CacheDamaged):
            damage.append(str(table))
        elif isinstance(table, PairTable):
            sound.append(block)
            parts.append(suspects.look(table))
            rows.append(np.arange(ends[at, 0] - pairs, ends[at, 0]))
        tracker.advance(pairs, tokens)
    scores = cache.blocks.each(cache.blocks.ref, sound)
    damage += [str(found) for _, found in scores if isinstance(found, CacheDamaged)]
    looked = np.concatenate(rows)
    return suspects.Looked.join(parts), looked, damage, int(sizes[:, 0].sum()) - len(looked)
