"""Plots are deterministic, show their numbers, follow the theme, and accept unusual inputs."""

import random
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest

from lsmix.pipeline.config.results import Interval
from lsmix.pipeline.views.error_rates import RunSummary
from lsmix.pipeline.views.plots import (
    Series,
    curves,
    difference_plot,
    distance_plot,
    error_rate_plot,
    gain_plot,
    histogram,
    pair_matrix,
    spread_plot,
)

RUNS = [
    RunSummary(label="baseline", errors=(5.1, 4.9), baseline=True),
    RunSummary(label="LS-Mix <α & β>", errors=(4.01,)),
    RunSummary(label="not yet", errors=()),
]
INTERVAL = Interval(value=0.25, low=0.0, high=0.5)
LAM = np.random.default_rng(0).beta(0.4, 0.4, 200)


def every_plot():
    nan = float("nan")
    return {
        "error rates": error_rate_plot(RUNS),
        "no runs": error_rate_plot([]),
        "curves": curves("Loss", [Series(label="a", x=[0, 1, 2], y=[1.0, nan, 0.5])], "x", "y"),
        "many": curves("L", [Series(label=str(i), x=[0], y=[i]) for i in range(7)], "x", "y", y_log=True),
        "no curves": curves("Loss", [], "x", "y"),
        "learning curve": curves(
            "L", [Series(label="a", x=[500, 1000], y=[3, 2], spread=[1, 1])], "images", "y", x_ticks=[500, 1000]
        ),
        "differences": difference_plot({"$a": INTERVAL, "b": Interval(value=-1, low=-2, high=-0.5)}, "points"),
        "gains": gain_plot({"$a": (INTERVAL, INTERVAL), "b": (INTERVAL, INTERVAL)}, "distance", "gain"),
        "histogram": histogram(np.arange(20), np.full(20, 3)),
        "no histogram": histogram(np.zeros(20), np.zeros(20)),
        "pairs": pair_matrix(np.arange(9).reshape(3, 3), ["cat", "$dog", "<owl>"]),
        "many pairs": pair_matrix(np.zeros((20, 20)), [f"a long class name {i}" for i in range(20)]),
        "spreads": spread_plot({"originals": LAM, "$mix": LAM + 1, "bad": np.array([np.nan])}, "bits"),
        "distances": distance_plot({"$mix": (INTERVAL, INTERVAL)}, "bits"),
        "no spreads": spread_plot({}, "bits"),
        "no distances": distance_plot({}, "bits"),
    }


@pytest.fixture(scope="module")
def plots():
    return every_plot()


def texts(svg):
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_svg_is_well_formed_and_contains_no_metadata(plots):
    for name, svg in plots.items():
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg", name
        assert b"metadata" not in svg
        assert b"matplotlib v" not in svg.lower()


def test_the_same_numbers_give_the_same_bytes_under_other_settings_and_seeds(plots):
    random.seed(123)
    with mpl.rc_context({"font.size": 31, "axes.facecolor": "pink", "svg.hashsalt": None}):
        assert every_plot() == plots
        assert mpl.rcParams["font.size"] == 31


def test_a_matrix_of_few_classes_shows_their_names_and_numbers():
    shown = texts(pair_matrix(np.array([[1200, 7], [0, 3]]), ["cat", "<owl>"]))
    assert {"cat", "<owl>", "1,200", "7", "0", "3"} <= set(shown)


def test_error_rates_are_formatted_as_in_the_paper():
    shown = texts(error_rate_plot(RUNS))
    assert {"5.00 ± 0.14", "4.01", "–", "LS-Mix <α & β>", "not yet"} <= set(shown)


def test_the_spread_over_seeds_is_the_sample_standard_deviation():
    errors = (2.0, 4.0, 9.0)
    run = RunSummary(label="x", errors=errors)
    assert run.mean == pytest.approx(np.mean(errors))
    assert run.std == pytest.approx(np.std(errors, ddof=1))
    assert RunSummary(label="x", errors=(3.0,)).std is None


def test_spread_plots_show_the_median_and_distance_plots_both_directions():
    assert "0.500" in texts(spread_plot({"a": np.array([0.25, 0.5, 0.75, np.inf])}, "bits"))
    assert "−0.250  +0.250" in texts(distance_plot({"a": (INTERVAL, INTERVAL)}, "bits"))


def test_svg_follows_the_theme_in_every_colour(plots):
    for name, svg in plots.items():
        text = svg.decode()
        assert "@media (prefers-color-scheme:dark)" in text, name
        # An element with a fixed colour instead of a variable would vanish in one of the themes.
        assert not re.findall(
            r"#[0-9a-f]{6}\b|rgb|black|white", re.sub(r"var\([^)]*\)", "", text.partition("</style>")[2])
        ), name


def test_names_with_dollars_and_underscores_are_not_parsed_as_mathematics():
    shown = texts(
        curves("$x", [Series(label=r"\frac$ $", x=[0, 1], y=[0, 1]), Series(label="b", x=[0], y=[0])], "x_1", "y")
    )
    assert {"$x", r"\frac$ $", "x_1"} <= set(shown)
