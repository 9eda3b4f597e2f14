"""Data sets with very few images work in every stage, or are rejected with one error line."""

from pathlib import Path

import numpy as np
import pytest
from factory import SMALL_RECIPE, write_images

from lsmix.data.artifact import read_manifest
from lsmix.data.latents import open_latents
from lsmix.data.pool import open_pool
from lsmix.pipeline.api import verify

pytestmark = pytest.mark.faults

HERE = "recipe.toml"
THREE = [0, 1, 2]


@pytest.fixture
def recipe_of(tmp_path):
    """Return a function that writes a data set with the given labels and a recipe with the given split."""

    def write(train, tested=None, *, naturalness=False, **split):
        labels = np.array(train, np.int64)
        write_images(tmp_path / "images.npz", labels, None if tested is None else np.array(tested, np.int64))
        text = SMALL_RECIPE.replace("heldout = 4\n", "".join(f"{name} = {value}\n" for name, value in split.items()))
        if not naturalness:
            text = text[: text.index("[naturalness]")] + text[text.index("[report]") :]
        (tmp_path / HERE).write_text(text, encoding="utf-8")
        return tmp_path / HERE

    return write


def run(command, recipe, stage="train"):
    return command(stage, recipe, "--workspace", recipe.parent / "runs", "--device", "cpu", "-q")


def check_refused(result, message, recipe):
    assert (result.code, result.out) == (1, ""), result
    errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, result.err
    assert errors[0].startswith("error: ")
    assert message in errors[0], errors[0]
    for folder in recipe.parent.glob("runs/*/*-*"):  # finished artifacts must be intact
        if (folder / "manifest.json").is_file():
            verify(folder)


def in_short(cases):
    """Return the cases, with all but the first two marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=[slow] if place > 1 else []) for place, case in enumerate(cases.values())]


def counts_of(workspace: Path) -> dict[str, int]:
    folder = next((workspace / "ingest").iterdir())
    counts = read_manifest(folder).counts
    return {name: counts[name] for name in ("train", "heldout", "test")}


WORKS = {
    "two images": (([0, 1], [0]), {}, (2, 0, 1)),
    "a limit of N - 1": (([*THREE * 4], [0]), {"limit": 11}, (11, 0, 1)),
    "a limit of N": (([*THREE * 4], [0]), {"limit": 12}, (12, 0, 1)),
    "a test set of one": (([*THREE * 4], [0, 1, 2]), {"test": 1}, (12, 0, 1)),
    "a class with one image": (([0] * 11 + [1], [0]), {}, (12, 0, 1)),
    "a class with one image, which may be held out": (([0] * 11 + [1], [0, 1]), {"heldout": 6}, (6, 6, 2)),
    "one more than a shard": (([0] * 9, [0]), {}, (9, 0, 1)),
    "a batch larger than the data set": (([0] * 5, [0]), {}, (5, 0, 1)),
}


# One image can be encoded and trained on, but not mixed.
ONE = {
    "one image": (([0], [0]), {}, (1, 0, 1)),
    "a limit of one": (([0] * 12, [0]), {"limit": 1}, (1, 0, 1)),
    "all but one held out": (([0] * 12, [0]), {"heldout": 11}, (1, 11, 1)),
    "all but one for the test": (([0] * 12,), {"test": 11}, (1, 0, 11)),
    "one for each": (([0, 0, 0],), {"heldout": 1, "test": 1}, (1, 1, 1)),
}


@pytest.mark.parametrize(("labels", "split", "expected"), in_short(WORKS), ids=WORKS)
def test_few_images_can_be_mixed_and_trained_on(recipe_of, command, labels, split, expected):
    recipe = recipe_of(*labels, **split)
    result = run(command, recipe)
    assert result.code == 0, result
    workspace = recipe.parent / "runs"
    assert tuple(counts_of(workspace).values()) == expected
    for path in workspace.glob("*/*/manifest.json"):
        verify(path.parent)
    pool = open_pool(next((workspace / "mix").iterdir()))
    assert sorted(pool.source_a[:]) == sorted(pool.source_b[:]) == list(range(expected[0]))
    assert "0 of 5 artifacts made" in run(command, recipe).out


@pytest.mark.parametrize(("labels", "split", "expected"), in_short(ONE), ids=ONE)
def test_one_image_can_be_encoded_and_trained_on_but_not_mixed(recipe_of, command, labels, split, expected):
    recipe = recipe_of(*labels, **split)
    check_refused(run(command, recipe), "mixing needs at least 2 training images, got 1. Raise 'data.limit'", recipe)
    assert tuple(counts_of(recipe.parent / "runs").values()) == expected
    (encoded,) = (recipe.parent / "runs" / "encode").iterdir()
    assert len(open_latents(encoded)) == 1
    recipe.write_text(recipe.read_text().replace("[pools.mixed]", "[mix]").replace('pool = "mixed"', ""))
    result = run(command, recipe)
    assert result.code == 0, result


@pytest.mark.slow
def test_a_classifier_without_errors_can_be_reported(recipe_of, command):
    recipe = recipe_of([0, 0], [0])
    result = run(command, recipe, "run")
    assert result.code == 0, result
    assert [line for line in result.err.splitlines() if not line.startswith("warning: ")] == []
    (metrics,) = recipe.parent.glob("runs/train/*/metrics.json")
    assert b'"test_error":0.0' in metrics.read_bytes().replace(b" ", b"")


REFUSED = {
    "no images": (([], [0]), {}, "images"),
    "no images and no test images": (([], []), {}, "images"),
    "no test images": (([*THREE * 4], []), {}, "test"),
    "a limit above the number of images": (
        ([*THREE * 4], [0]),
        {"limit": 13},
        "limit is 13, but there are 12 published training images",
    ),
    "all held out": (([*THREE * 4], [0]), {"heldout": 12}, "at least 1 must be left"),
    "all for the test": (([*THREE * 4],), {"test": 12}, "at least 1 must be left"),
    "no test split": (([*THREE * 4],), {}, "would leave no test images"),
    "one image for training and test": (([0],), {"test": 1}, "at least 1 must be left"),
    "more than the published test images": (([*THREE * 4], [0]), {"test": 2}, "choose 1 to 1"),
    "a negative number": (([*THREE * 4], [0]), {"heldout": -1}, "heldout"),
}


@pytest.mark.parametrize(("labels", "split", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_numbers_are_rejected_with_one_error_line(recipe_of, command, labels, split, message):
    recipe = recipe_of(*labels, **split)
    check_refused(run(command, recipe), message, recipe)
    assert not list(recipe.parent.glob("runs/*/*/manifest.json"))


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        (THREE * 4, 0, "there are none. Set 'data.heldout'"),
        (THREE * 4, 1, "needs at least 2 held-out images and 8 training images, got 1 and 11"),
        ([0] * 6, 2, "needs at least 2 held-out images and 8 training images, got 2 and 4"),
    ],
)
def test_naturalness_with_too_few_images_is_rejected(recipe_of, command, train, heldout, message):
    recipe = recipe_of(train, [0], naturalness=True, heldout=heldout)
    check_refused(run(command, recipe, "naturalness"), message, recipe)


def test_naturalness_with_the_minimum_number_of_images_works(recipe_of, command):
    recipe = recipe_of([0] * 9, [0], naturalness=True, heldout=2)
    result = run(command, recipe, "naturalness")
    assert result.code == 0, result
