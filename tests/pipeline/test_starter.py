"""``lsmix init --from``: the recipe that it writes runs as it is."""

import factory
import numpy as np
import pytest
from PIL import Image

from lsmix.data.errors import MissingError, RecipeError
from lsmix.data.progress import NullProgress
from lsmix.pipeline.api import run
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.starter import starter_recipe

RNG = np.random.default_rng(0)


def put(path, width=40, height=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def written(folder, source):
    (folder / "my.toml").write_text(starter_recipe(source, workspace=folder / "runs"), encoding="utf-8")
    return read_recipe(folder / "my.toml")


def test_the_recipe_for_a_folder_of_photographs_runs_as_it_is(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        put(tmp_path / f"my photos/{'ab'[number % 2]}/{number}.png", width=40 + number)
    (tmp_path / "my photos/a/bad.png").write_bytes(b"no image")
    (tmp_path / "my photos/a/n\n.txt").touch()
    printed = command("init", "--from", "my photos").out
    assert "# left out: 1, not a supported image type (.txt) (a/n?.txt)\n" in printed
    assert "# Training images by class: a 16, b 15." in printed
    assert "in all." in printed
    (tmp_path / "my.toml").write_text(printed, encoding="utf-8")
    recipe = read_recipe(tmp_path / "my.toml")
    assert (recipe.name, recipe.data.size, recipe.data.test, recipe.own_flow.path) == ("my-photos", 32, 3, "natural-32")
    small = [
        "pools.lsmix.copies=1",
        "classifier.width=4",
        "classifier.epochs=1",
        "report.pairs=1",
        "report.bits_images=4",
    ]
    assert command("run", "my.toml", "-q", *(part for one in small for part in ("--set", one))).code == 0
    assert list(tmp_path.glob("runs/report/*/report.html"))


def test_a_table_of_labels_is_found_and_images_of_one_small_size_keep_it(tmp_path):
    for number in range(12):
        put(tmp_path / f"set/images/{number}.png", 16, 16)
    lines = [f"{number},{'xyz'[number % 3]}" for number in range(12)]
    (tmp_path / "set/labels.csv").write_text("\n".join(["id,kind", *lines]))
    recipe = written(tmp_path, str(tmp_path / "set"))
    assert (recipe.data.labels_file, recipe.data.file_column, recipe.data.label_column) == ("labels.csv", "id", "kind")
    assert (recipe.data.size, recipe.own_flow.levels) == (0, 2)


def test_arrays_with_their_own_test_images_keep_them(tmp_path):
    images = RNG.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    labels = np.arange(200) % 10
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    recipe = written(tmp_path, str(tmp_path / "a.npz"))
    assert (recipe.name, recipe.data.test, recipe.data.heldout, recipe.data.on_error) == ("a", 0, 10, "stop")


def test_settings_become_smaller_as_the_data_set_grows(tmp_path):
    recipes = []
    for count in (200, 20_000):
        np.savez(tmp_path / "a.npz", images=np.zeros((count, 30, 30, 3), np.uint8), labels=np.arange(count) % 2)
        recipes.append(written(tmp_path, str(tmp_path / "a.npz")))
    few, many = recipes
    assert few.own_flow.training.iterations < many.own_flow.training.iterations
    assert few.classifier.epochs > many.classifier.epochs
    assert few.pools["lsmix"].copies > many.pools["lsmix"].copies


def test_a_source_that_cannot_be_split_or_read_is_refused(tmp_path):
    with pytest.raises(MissingError, match="the path does not exist"):
        starter_recipe(str(tmp_path / "nothing"))
    for name in "abc":
        put(tmp_path / f"set/{name}/0.png")
    with pytest.raises(RecipeError, match="leaves 1 of 3 classes without training images"):
        starter_recipe(str(tmp_path / "set"))


def test_a_warning_comes_before_work_of_more_than_a_day(tmp_path, command, monkeypatch):
    for row in range(40):
        put(tmp_path / f"images/{row % 2}/{row}.png", 8, 8)
    recipe = tmp_path / "my.toml"
    recipe.write_text(factory.SMALL_RECIPE.replace('path = "images.npz"\nformat = "npz"', 'path = "images"\ntest = 4'))
    long = ["flow.training.iterations=100000000", "flow.training.batch_size=65536"]
    words = (recipe, "--workspace", tmp_path / "runs", *(part for one in long for part in ("--set", one)))
    result = command("status", *words)
    assert result.err.startswith("warning: this takes about ")
    assert "train-glow" in result.err
    assert "(lower flow.training.iterations, flow.steps, flow.hidden or data.size). Or use a GPU." in result.err
    assert "~" in next(line for line in result.out.splitlines() if "train-glow" in line)
    assert not command("status", recipe, "--workspace", tmp_path / "runs").err
    warned = []
    monkeypatch.setattr(NullProgress, "warning", lambda self, message: warned.append(message))
    monkeypatch.setattr(NullProgress, "info", lambda self, message: stop() if warned else None)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, workspace=tmp_path / "runs", device="cpu", overrides=long)
    assert [f"warning: {warned[0]}\n"] == [result.err]
