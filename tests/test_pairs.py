"""EncodedPair and PairTable against plain computation; batches as properties."""

from itertools import islice

import numpy as np
import pytest

from minicache.errors import ConfigError
from minicache.pairs import COUNTED_AT_ONCE, EncodedPair, PairTable, count_tokens
from minicache.scoring.batching import balance, by_length
from minicache.training.order import Mixture, global_batches, pairs_in, shares, training_steps


def random_sides(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Few distinct ids, so that beginnings agree for a while, in ids, in mask, or in both."""
    chosen, rejected = (
        (random.integers(0, 2, length).astype(np.int32), random.integers(0, 2, length).astype(np.uint8))
        for length in (random.integers(1, 9) for _ in range(2))
    )
    return *chosen, *rejected


PAIRS = [EncodedPair.join(*random_sides(np.random.default_rng(seed)), source=(0, seed)) for seed in range(300)]


def test_join_keeps_both_sides_and_shares_as_much_as_it_can() -> None:
    for seed, pair in enumerate(PAIRS):
        chosen, chosen_mask, rejected, rejected_mask = random_sides(np.random.default_rng(seed))
        for side, (ids, mask) in enumerate([(chosen, chosen_mask), (rejected, rejected_mask)]):
            assert np.array_equal(pair.side(side)[0], ids) and np.array_equal(pair.side(side)[1], mask)
        prefix = pair.lengths[0]
        assert min(pair.lengths[1:]) >= 1
        same = [a == b and x == y for a, b, x, y in zip(chosen, rejected, chosen_mask, rejected_mask, strict=False)]
        longest = same.index(False) if False in same else len(same)
        assert prefix == min(longest, len(chosen) - 1, len(rejected) - 1)


def test_a_table_is_its_pairs() -> None:
    table = PairTable.from_pairs(PAIRS, "uint16")
    for index, pair in enumerate(PAIRS):
        assert table[index].digest == pair.digest == table.digest[index].astype("<u8").tobytes()
        assert table[index].lengths == pair.lengths and table[index].source == pair.source
        assert table.side_lengths[index].tolist() == [len(pair.side(side)[0]) for side in (0, 1)]
        assert table.token_counts[index].tolist() == [int(pair.side(side)[1].sum()) for side in (0, 1)]
    halves = [PairTable.from_pairs(PAIRS[:100], "uint16"), PairTable.from_pairs(PAIRS[100:], "uint16")]
    whole = PairTable.concatenate(halves)
    assert np.array_equal(whole.tokens, table.tokens) and np.array_equal(whole.offsets, table.offsets)


@pytest.mark.parametrize("count", [0, 1, COUNTED_AT_ONCE, 2 * COUNTED_AT_ONCE + 7])
def test_counted_tokens_of_many_pairs_and_long_ones(count: int) -> None:
    random = np.random.default_rng(count)
    lengths = random.integers(0, 3, (count, 3)).astype(np.int32)
    lengths[::500] = (300, 0, 700)  # more than a byte counts
    mask = random.integers(0, 2, lengths.sum()).astype(np.uint8)
    expected, start = [], 0
    for sizes in lengths.tolist():
        ends = start + np.cumsum(sizes)
        prefix, *rests = (int(mask[end - size : end].sum()) for size, end in zip(sizes, ends, strict=True))
        expected.append([prefix + rest for rest in rests])
        start = int(ends[-1])
    assert count_tokens(lengths, mask).tolist() == expected


def test_a_digest_sees_every_part_and_no_dtype() -> None:
    pair = EncodedPair(np.array([5, 6, 7, 8]), np.array([0, 1, 1, 1], np.uint8), (2, 1, 1))
    assert EncodedPair(pair.tokens.astype(np.uint16), pair.loss_mask, (2, 1, 1), (9, 9)).digest == pair.digest
    others = [
        EncodedPair(np.array([5, 6, 7, 9]), pair.loss_mask, pair.lengths),
        EncodedPair(pair.tokens, np.array([0, 0, 1, 1], np.uint8), pair.lengths),
        EncodedPair(pair.tokens, pair.loss_mask, (1, 2, 1)),
        EncodedPair(pair.tokens, pair.loss_mask, (1, 1, 2)),
    ]
    assert len({pair.digest, *(other.digest for other in others)}) == 5


LENGTHS = np.random.default_rng(0).integers(1, 200, 500)


@pytest.mark.parametrize("budget", [1, 100, 1000, 10**9])
@pytest.mark.parametrize("pads", [True, False])
def test_by_length_takes_every_pair_once_within_the_budget(budget: int, pads: bool) -> None:
    batches = by_length(LENGTHS, budget, pads)
    assert sorted(np.concatenate(batches)) == list(range(500))
    slots = [len(batch) * LENGTHS[batch].max() if pads else LENGTHS[batch].sum() for batch in batches]
    assert all(len(batch) == 1 or used <= budget for batch, used in zip(batches, slots, strict=True))
    after = [LENGTHS[batch[0]] for batch in batches[1:]]  # the next longest would not have fitted
    room = [
        budget - (used + LENGTHS[batch].max() if pads else used) for batch, used in zip(batches, slots, strict=True)
    ]
    assert all(left < (0 if pads else need) for left, need in zip(room, after, strict=False))


@pytest.mark.parametrize("shares", [1, 2, 7, 600])
def test_balance_takes_every_item_once_and_evenly(shares: int) -> None:
    groups = balance(LENGTHS, shares)
    assert sorted(np.concatenate(groups)) == list(range(500))
    totals = [LENGTHS[group].sum() for group in groups]
    assert max(totals) - min(totals) <= LENGTHS.max()


@pytest.mark.parametrize(("pairs", "batch_size"), [(10, 3), (10, 5), (10, 100), (1, 1)])
def test_every_epoch_is_a_new_order_of_all_pairs_and_can_be_entered_anywhere(pairs: int, batch_size: int) -> None:
    steps = training_steps(pairs, batch_size, 3, None)
    batches = list(islice(global_batches(Mixture.of([np.arange(pairs)]), batch_size, 5), steps))
    per_epoch = steps // 3
    taken = [sum(map(len, batches[:count])) for count in range(steps + 1)]
    assert taken == [pairs_in(count, pairs, batch_size) for count in range(steps + 1)]
    epochs = [np.concatenate(batches[at * per_epoch : (at + 1) * per_epoch]) for at in range(3)]
    assert all(sorted(epoch) == list(range(pairs)) for epoch in epochs)
    assert pairs == 1 or any(not np.array_equal(epochs[0], epoch) for epoch in epochs[1:])
    for start in range(steps):
        later = islice(global_batches(Mixture.of([np.arange(pairs)]), batch_size, 5, first_step=start), steps - start)
        assert all(np.array_equal(a, b) for a, b in zip(batches[start:], later, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_a_batch_among_them_without_rest(size: int) -> None:
    for batch in islice(global_batches(Mixture.of([np.arange(500)]), 64, 0), 8):
        pieces = shares(batch, LENGTHS, size)
        assert sorted(np.concatenate(pieces)) == sorted(batch)
    assert len(shares(np.array([3]), LENGTHS, 2)[1]) == 0


def test_steps_are_counted_in_whole_batches() -> None:
    assert training_steps(100, 32, 1, None) == 4
    assert training_steps(100, 32, 0.5, None) == 2
    assert training_steps(100, 32, 0.01, None) == 1
    assert training_steps(100, 32, 1, 7) == training_steps(100, 32, 1e300, 7) == 7
    for epochs, max_steps in ((1e300, None), (1e308, None), (1, 2**53)):
        with pytest.raises(ConfigError, match="expected fewer than 9,007,199,254,740,992 steps"):
            training_steps(100, 32, epochs, max_steps)
