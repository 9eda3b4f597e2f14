"""Combined loaders: an epoch is as long as an epoch of each source, and every batch comes from one drawn source."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.loaders.combined_loader import CombinedLoader, choose_parts

WEIGHTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)


def source(mark, rows=50, batch_size=8):
    images = np.full((rows, 2, 2, 1), mark, np.uint8)
    images[:, 0, 0, 0] = np.arange(rows)
    return ArrayLoader(images, np.full(rows, mark), batch_size, seed=mark)


def combined(weights=(1.0, 1.0), rows=50):
    loaders = [source(mark, rows) for mark in range(len(weights))]
    return CombinedLoader(loaders, weights, seed=5)


@given(seed=st.integers(0, 99), epoch=st.integers(0, 99), weights=WEIGHTS)
def test_the_choice_of_sources_does_not_depend_on_the_number_of_batches(seed, epoch, weights):
    parts = choose_parts(seed, epoch, 40, weights)
    assert ((parts >= 0) & (parts < len(weights))).all()
    np.testing.assert_array_equal(choose_parts(seed, epoch, 60, weights)[:40], parts)


def test_sources_are_drawn_in_proportion_to_their_weights():
    # 10,000 draws of probability 0.75: four standard errors are 0.018.
    parts = np.concatenate([choose_parts(0, epoch, 100, (3.0, 1.0)) for epoch in range(100)])
    assert (parts == 0).mean() == pytest.approx(0.75, abs=0.018)


def test_each_batch_equals_the_same_batch_of_the_chosen_source():
    loader = combined((1.0, 2.0, 1.0))
    for epoch in range(3):
        loader.set_epoch(epoch)
        chosen = choose_parts(5, epoch, len(loader), (1.0, 2.0, 1.0))
        single = []
        for mark in range(3):
            one = source(mark)
            one.set_epoch(epoch)
            single.append(list(one))
        batches = list(loader)
        assert len(batches) == len(loader) == 7
        assert sum(len(batch.images) for batch in batches) == 50
        for index, batch in enumerate(batches):
            for got, expected in zip(batch, single[chosen[index]][index], strict=True):
                assert (got == expected).all()


@given(taken=st.integers(0, 7))
def test_a_pass_resumes_from_any_batch(taken):
    loader = combined()
    loader.set_epoch(2)
    full = [batch.images.clone() for batch in loader]
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    resumed = combined()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.images for batch in resumed]
    expected = full[taken:]
    assert len(rest) == len(expected)
    assert all((got == want).all() for got, want in zip(rest, expected, strict=True))


def test_states_of_other_sources_and_sources_of_different_lengths_are_rejected():
    with pytest.raises(RecipeError, match="belongs to another order"):
        combined().load_state_dict(combined(rows=49).state_dict())
    with pytest.raises(RecipeError, match="belongs to another order"):
        combined().load_state_dict(combined((1.0, 2.0)).state_dict())
    with pytest.raises(RecipeError, match=r"the same number of images.*(total=20.*total=50|total=50.*total=20)"):
        CombinedLoader([source(0), source(1, rows=20)], [1.0, 1.0])
