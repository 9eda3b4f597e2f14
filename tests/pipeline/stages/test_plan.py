"""The plan of a pool depends only on (seed, copy, position), not on how the work is split."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.pool_spec import CORNERS, PoolConfig
from lsmix.pipeline.stages.pair_sampler import PairSampler

rates = st.floats(0, 1)
two_source_settings = st.fixed_dictionaries(
    {
        "images": st.integers(1, 40),
        "copies": st.integers(1, 5),
        "alpha": st.floats(0.05, 5),
        "lambdas": st.lists(rates, max_size=4).map(tuple),
        "seed": st.integers(0, 2**63 - 1),
        "corner": st.sampled_from([*CORNERS, "random"]),
    }
)
more_source_settings = st.fixed_dictionaries(
    {
        "images": st.integers(1, 40),
        "copies": st.integers(1, 3),
        "alpha": st.floats(0.05, 5),
        "lambdas": st.just(()),
        "seed": st.integers(0, 2**63 - 1),
        "sources": st.integers(3, 6),
    }
)
any_settings = two_source_settings | more_source_settings


def sampler(*, images, **config):
    return PairSampler(PoolConfig(**{"alpha": 0.4, **config}), images)


def all_rows(plan):
    return rows_of(plan, 0, len(plan))


def rows_of(plan, start, stop):
    return plan.pairs(np.arange(start, stop))


@given(any_settings, st.data())
def test_the_plan_does_not_depend_on_splits_and_their_order(settings, data):
    expected = all_rows(sampler(**settings))
    rows = len(expected.lam)
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=6))})
    spans = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    shared = sampler(**settings)
    for start, stop in spans:
        for plan in (shared, sampler(**settings)):  # one worker for all shards, or one for each
            for got, column in zip(rows_of(plan, start, stop), expected, strict=True) if start < stop else ():
                np.testing.assert_array_equal(got, column[start:stop])


@given(any_settings)
def test_each_copy_uses_every_image_once_as_first_and_once_as_second(settings):
    plan = sampler(**settings)
    draw, images = all_rows(plan), settings["images"]
    assert len(draw.lam) == len(plan) == images * settings["copies"]
    for copy in range(settings["copies"]):
        part = slice(copy * images, (copy + 1) * images)
        for column in (draw.source_a, *draw.others.T):
            assert column.dtype == np.int64
            np.testing.assert_array_equal(np.sort(column[part]), np.arange(images))


@given(two_source_settings)
def test_copies_cycle_through_given_lambdas_and_drawn_ones_lie_in_0_to_1(settings):
    lam, grid = all_rows(sampler(**settings)).lam[:, 0], settings["lambdas"]
    assert ((lam >= 0) & (lam <= 1)).all()
    if grid:
        per_copy = lam.reshape(settings["copies"], settings["images"])
        for copy, row in enumerate(per_copy):
            assert (row == grid[copy % len(grid)]).all()


@given(any_settings, st.data())
def test_a_redraw_depends_only_on_copy_position_and_attempt(settings, data):
    row = data.draw(st.integers(0, settings["images"] * settings["copies"] - 1))
    attempt = data.draw(st.integers(1, 5))
    fresh, used = sampler(**settings), sampler(**settings)
    rows_of(used, 0, len(used))
    used.resample(row, attempt + 1)
    others, lam = fresh.resample(row, attempt)
    assert others.shape == lam.shape == (settings.get("sources", 2) - 1,)
    assert ((others >= 0) & (others < settings["images"])).all()
    assert (lam >= 0).all()
    assert lam.sum() <= 1 + 1e-12
    # Adding copies does not change the earlier copies.
    for plan in (used, sampler(**{**settings, "copies": settings["copies"] + 1})):
        np.testing.assert_array_equal(plan.resample(row, attempt)[0], others)
        np.testing.assert_array_equal(plan.resample(row, attempt)[1], lam)


@given(any_settings)
def test_adding_copies_does_not_change_the_first_ones(settings):
    few = all_rows(sampler(**settings))
    more = all_rows(sampler(**{**settings, "copies": settings["copies"] + 2}))
    for before, after in zip(few, more, strict=True):
        np.testing.assert_array_equal(after[: len(before)], before)


def test_seeds_copies_and_attempts_give_different_plans():
    # 64 images have 64! orders, so two do not agree by chance.
    plan = sampler(images=64, copies=2, seed=0)
    other = sampler(images=64, copies=2, seed=1)
    first, second = rows_of(plan, 0, 64), rows_of(plan, 64, 128)
    for one, two in ((first, second), (first, rows_of(other, 0, 64))):
        assert all((a != b).any() for a, b in zip(one[:3], two[:3], strict=True))  # all corners are equal
    assert (first.source_a != first.others[:, 0]).any()
    assert len({float(plan.resample(row, attempt)[1][0]) for row in (0, 1, 64) for attempt in (1, 2)}) == 6


def test_drawn_lambdas_follow_beta():
    # 50,000 draws of Beta(0.4, 0.4): mean ½ and variance 1/(4·(2α+1)) = 0.1389; four standard errors are 0.007 and 0.002.
    lam = all_rows(sampler(images=50_000, copies=1, seed=3)).lam
    assert lam.mean() == pytest.approx(0.5, abs=0.007)
    assert lam.var() == pytest.approx(1 / 7.2, abs=0.002)


def test_the_pairs_of_a_seed_match_recorded_ones():
    # Recorded from the first version. NumPy guarantees stable streams, so a different plan means a changed seed rule.
    draw = all_rows(sampler(images=6, copies=1, seed=0))
    assert draw.source_a.tolist() == [0, 5, 1, 4, 3, 2]
    assert draw.others[:, 0].tolist() == [5, 2, 4, 0, 1, 3]


def test_all_corners_are_drawn_without_other_changes():
    fixed = all_rows(sampler(images=200, copies=1, seed=0))
    drawn = all_rows(sampler(images=200, copies=1, seed=0, corner="random"))
    assert not fixed.corner.any()
    assert set(drawn.corner.tolist()) == {0, 1, 2, 3}
    for before, after in zip(fixed[:3], drawn[:3], strict=True):
        np.testing.assert_array_equal(before, after)


def test_shares_of_three_sources_follow_dirichlet():
    # Dirichlet(1, 1, 1): every share has mean 1/3 and variance 1/18; four standard errors of 20,000 draws are below 0.007.
    lam = all_rows(sampler(images=20_000, copies=1, alpha=1.0, seed=3, sources=3)).lam
    assert lam.shape == (20_000, 2)
    assert lam.mean(axis=0) == pytest.approx([1 / 3, 1 / 3], abs=0.007)
    assert lam.var(axis=0) == pytest.approx([1 / 18, 1 / 18], abs=0.002)


def test_the_draws_of_a_method_depend_only_on_row_and_attempt():
    plan = sampler(images=10, copies=2, seed=0)
    rows = np.array([3, 13, 17])
    draws = plan.row_rng(rows, 0)
    assert draws(1).random() == plan.row_rng(rows[1:], 0)(0).random()
    assert len({draws(0).random(), draws(1).random(), plan.row_rng(rows, 1)(0).random()}) == 3
