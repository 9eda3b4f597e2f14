"""Learning rates follow the paper literally."""

from functools import partial

import pytest

from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.training import learning_rate


def test_the_rate_decays_every_two_epochs_after_the_given_updates():
    # SVHN: 73,257 images in batches of 128 are 573 updates per epoch.
    rate = partial(learning_rate, ClassifierTraining(decay_after_updates=60_000), updates_per_epoch=573)
    assert rate(0) == rate(60_000) == rate(60_000 + 2 * 573 - 1) == 1e-3
    assert rate(60_000 + 2 * 573) == pytest.approx(0.97e-3)
    assert rate(60_000 + 20 * 573) == pytest.approx(1e-3 * 0.97**10)


def test_the_papers_decay_on_cifar_10_is_never_reached():
    assert learning_rate(ClassifierTraining(), 300 * 391, updates_per_epoch=391) == 1e-3


def test_cosine_decays_to_zero_and_stays_there():
    config = ClassifierTraining(schedule="cosine", learning_rate=0.1, epochs=10)
    rate = partial(learning_rate, config, updates_per_epoch=100)
    rates = [rate(update) for update in range(0, 1001, 50)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1], rate(2000)) == (0.1, 0.0, 0.0)
    assert rate(250) + rate(750) == pytest.approx(0.1)


def test_constant_is_constant():
    rate = partial(learning_rate, ClassifierTraining(schedule="constant", learning_rate=0.3), updates_per_epoch=5)
    assert {rate(update) for update in (0, 1, 10**9)} == {0.3}
