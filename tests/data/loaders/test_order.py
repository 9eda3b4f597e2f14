"""The order of an epoch contains every row once, is the same in every process, and is split into disjoint parts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.loaders.sampler import BatchPlan, EpochOrder

ROWS = st.tuples(st.integers(0, 40), st.integers(1, 60)).map(lambda pair: range(pair[0], sum(pair)))
BLOCKS = {"block_rows": st.integers(1, 70), "window_blocks": st.integers(1, 5)}


@given(rows=ROWS, seed=st.integers(0, 3), epoch=st.integers(0, 3), shuffle=st.booleans(), **BLOCKS)
def test_every_row_comes_exactly_once(rows, seed, epoch, shuffle, block_rows, window_blocks):
    order = EpochOrder(
        rows, block_rows=block_rows, window_blocks=window_blocks, seed=seed, epoch=epoch, shuffle=shuffle
    )
    found = order.slice(0, len(order)).tolist()
    assert sorted(found) == list(rows)
    assert shuffle or found == list(rows)


@given(rows=ROWS, cuts=st.lists(st.floats(0, 1), max_size=6), **BLOCKS)
def test_any_slice_equals_that_part_of_the_full_order(rows, cuts, block_rows, window_blocks):
    def order():
        return EpochOrder(rows, block_rows=block_rows, window_blocks=window_blocks, seed=1, epoch=2)

    full = order().slice(0, len(rows))
    edges = [0, *sorted(int(cut * len(rows)) for cut in cuts), len(rows)]
    for start, stop in reversed(list(pairwise(edges))):
        np.testing.assert_array_equal(order().slice(start, stop), full[start:stop])


def test_every_seed_and_epoch_gives_a_different_order():
    orders = {
        tuple(EpochOrder(range(50), block_rows=10, window_blocks=2, seed=seed, epoch=epoch).slice(0, 50).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_consecutive_rows_are_shuffled_across_the_blocks_of_one_window():
    order = EpochOrder(range(1000), block_rows=10, window_blocks=4, seed=0, epoch=0)
    for start in range(0, 1000, 40):
        rows = order.slice(start, start + 40)
        assert len(set(rows // 10)) == 4
        assert len(set(rows[:20] // 10)) > 1  # not block by block


def test_one_block_gives_a_full_permutation():
    # The mean distance between a row's positions before and after is n/3 for a uniform permutation. Its standard
    # deviation over permutations is about n/√(22·n), here 1.4% of the mean, so a deviation of 10% is no coincidence.
    rows = EpochOrder(range(2000), block_rows=2000, window_blocks=1, seed=0, epoch=0).slice(0, 2000)
    assert np.abs(rows - np.arange(2000)).mean() == pytest.approx(2000 / 3, rel=0.1)


def test_the_order_equals_a_recorded_one():
    # Recorded with the call below. A change would break resuming for runs that users have started.
    order = EpochOrder(range(3, 17), block_rows=4, window_blocks=2, seed=7, epoch=1)
    assert order.slice(0, 14).tolist() == [3, 16, 10, 15, 9, 13, 14, 12, 8, 11, 7, 5, 4, 6]


PLANS = {
    "total": st.integers(0, 200),
    "batch_size": st.integers(1, 40),
    "world_size": st.integers(1, 5),
    "drop_last": st.booleans(),
}


def plans(total, position, batch_size, world_size, drop_last):
    return [
        BatchPlan(
            total=total,
            position=position,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        for rank in range(world_size)
    ]


@given(part=st.floats(0, 1), **PLANS)
def test_ranks_get_disjoint_equal_batches_and_drop_only_the_documented_remainder(
    total, part, batch_size, world_size, drop_last
):
    position = int(part * total)
    ranks = plans(total, position, batch_size, world_size, drop_last)
    assert len({len(plan) for plan in ranks}) == 1
    taken = []
    for batch in range(len(ranks[0])):
        spans = [plan.span(batch) for plan in ranks]
        assert len({stop - start for start, stop in spans}) == 1
        assert 1 <= spans[0][1] - spans[0][0] <= batch_size
        for start, stop in spans:
            taken.extend(range(start, stop))
    # Disjoint and without a gap from the position on.
    assert taken == list(range(position, position + len(taken)))
    left_out = total - position - len(taken)
    assert left_out < (batch_size * world_size if drop_last else world_size)


@given(done=st.integers(0, 20), batch_size_2=st.integers(1, 40), world_size_2=st.integers(1, 5), **PLANS)
def test_another_world_size_and_batch_size_continue_with_exactly_the_rest(
    done, batch_size_2, world_size_2, total, batch_size, world_size, drop_last
):
    first = plans(total, 0, batch_size, world_size, drop_last)
    done = min(done, len(first[0]))
    position = first[0].position_after(done)
    second = plans(total, position, batch_size_2, world_size_2, drop_last)
    seen = [i for batch in range(done) for plan in first for i in range(*plan.span(batch))]
    seen += [i for batch in range(len(second[0])) for plan in second for i in range(*plan.span(batch))]
    assert len(seen) == len(set(seen))
    if world_size == world_size_2 == 1 and not drop_last:
        assert seen == list(range(total))
