"""Differences from the baseline: the coverage of their intervals, and the conclusions drawn from them."""

import math

import numpy as np
import pytest

import lsmix
from lsmix.pipeline.config.results import Interval, read_metrics, read_predictions
from lsmix.pipeline.views.error_rates import RunSummary, paired_difference
from lsmix.pipeline.views.report.results import error_table, verdicts


def drawn(rng, seeds, images, shift):
    """Simulate which images two runs get wrong; images differ in difficulty, and so do the seeds of a run."""
    image = rng.normal(0.0, 1.0, images)
    either = image + rng.normal(0.0, 0.1, (2, seeds, 1)) + rng.normal(0.0, 0.7, (2, seeds, images))
    own = rng.normal(0.0, 0.3, images)  # some images are harder for the first run
    return either[0] + own > 0.5 + shift, either[1] > 0.5


def test_the_difference_equals_the_difference_of_the_mean_errors():
    wrong, baseline = drawn(np.random.default_rng(0), 5, 500, 0.2)
    difference = paired_difference(wrong, baseline)
    assert difference.value == pytest.approx(100.0 * (wrong.mean() - baseline.mean()))
    assert difference.low < difference.value < difference.high


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_the_interval_covers_the_true_difference_in_95_percent_of_simulated_comparisons(seeds):
    rng = np.random.default_rng(seeds)
    first, second = (
        0.5 * math.erfc(bound / math.sqrt(2.0 * variance)) for bound, variance in ((0.6, 1.59), (0.5, 1.5))
    )
    truth = 100.0 * (first - second)
    found = [paired_difference(*drawn(rng, seeds, 300, 0.1)) for _ in range(400)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert covered >= 0.91
    assert seeds < 5 or covered < 0.99, "the interval is wider than necessary"


def test_one_seed_gives_no_interval_and_equal_predictions_give_an_interval_of_length_0():
    wrong, baseline = drawn(np.random.default_rng(0), 2, 100, 0.0)
    assert paired_difference(wrong[:1], baseline[:1]) is None
    assert paired_difference(wrong, wrong) == Interval(value=0.0, low=0.0, high=0.0)


def summary(label, low, high):
    difference = Interval(value=(low + high) / 2, low=low, high=high)
    return RunSummary(label=label, errors=(5.0, 5.0), difference=difference)


def test_a_report_says_better_or_worse_only_if_the_interval_excludes_0():
    baseline = RunSummary(label="baseline", errors=(5.0, 5.0), baseline=True)
    runs = [baseline, summary("LS-Mix", -2.0, -1.0), summary("MixUp", -1.0, 0.5), summary("Linear", 0.25, 2.0)]
    assert verdicts(runs) == (
        "Better than the baseline: LS-Mix; worse than the baseline: Linear; no clear difference from the baseline: MixUp."
    )
    assert verdicts([baseline]) == ""
    table = error_table(runs)
    assert [row[2] for row in table.rows] == [
        "–",
        "−1.50 [−2.00, −1.00]",
        "−0.25 [−1.00, +0.50]",
        "+1.12 [+0.25, +2.00]",
    ]
    assert "95% confidence interval" in table.note


def test_predictions_come_from_the_last_epoch_which_is_always_evaluated(tiny_recipe, tiny_workspace):
    overrides = ["classifier.evaluate_every=2", "classifier.epochs=3"]
    result = lsmix.run(tiny_recipe, workspace=tiny_workspace, stage="train", overrides=overrides, device="cpu")
    for item in (item for item in result.built if item.stage == "train"):
        metrics, predictions = read_metrics(item.folder), read_predictions(item.folder)
        assert [line.test_error is None for line in metrics] == [True, False, False]
        wrong = np.not_equal(predictions.predicted, predictions.labels)
        assert 100.0 * wrong.mean() == pytest.approx(metrics[-1].test_error)
        assert item.manifest.counts["test_error"] == metrics[-1].test_error
