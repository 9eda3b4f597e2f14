"""``lsmix.run`` with a dictionary or a Recipe in place of a file, and with images in memory in place of ``data.path``."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import factory
import numpy as np
import pytest
import torch
from PIL import Image

import lsmix
from lsmix.data.errors import LsmixError, RecipeError, SourceError
from lsmix.pipeline.api import plan
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.engine.resolver import Resolver

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(24) % 2
NAMES = ("cat", "dog")
DATA = {"test": 4, "heldout": 2}


class Pictures:
    """A map-style data set, as torchvision has them."""

    classes = NAMES

    def __init__(self, convert=lambda image: image):
        self.convert = convert

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, row):
        return self.convert(IMAGES[row]), int(LABELS[row])


class HubPictures(Pictures):
    """One as Hugging Face has them."""

    features: ClassVar = {"label": SimpleNamespace(names=list(NAMES))}

    def __getitem__(self, row):
        return {"image": Image.fromarray(IMAGES[row]), "label": int(LABELS[row])}


def as_tensor(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy()).float().div(255)


def ingest(data, workspace, **fields):
    recipe = {"name": "mine", "data": {**DATA, **fields}}
    return lsmix.run(recipe, stage="ingest", workspace=workspace, data=data)["ingest"]


def digest(built):
    return built.manifest.content_digest


@pytest.fixture(scope="module")
def from_arrays(tmp_path_factory):
    return ingest({"train": (IMAGES, LABELS), "class_names": NAMES}, tmp_path_factory.mktemp("arrays"))


@pytest.mark.parametrize(
    "data",
    [
        {"train": (IMAGES.transpose(0, 3, 1, 2), list(LABELS)), "class_names": list(NAMES)},
        (list(map(Image.fromarray, IMAGES)), [NAMES[label] for label in LABELS]),
        Pictures(),
        Pictures(Image.fromarray),
        Pictures(as_tensor),
        HubPictures(),
    ],
    ids=["NCHW", "names", "arrays", "pillow", "tensors", "hub"],
)
def test_the_same_images_give_the_same_data_set_however_they_are_passed(data, from_arrays, tmp_path):
    assert digest(ingest(data, tmp_path)) == digest(from_arrays)


def test_images_in_memory_give_the_data_set_of_their_files(from_arrays, tmp_path):
    for row, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = tmp_path / f"files/{NAMES[label]}/{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    order = np.argsort(LABELS, kind="stable")  # as folders are read
    recipe = {"name": "mine", "data": {"path": tmp_path / "files", **DATA}}
    files = lsmix.run(recipe, stage="ingest", workspace=tmp_path)["ingest"]
    assert digest(files) == digest(ingest((IMAGES[order], [NAMES[label] for label in LABELS[order]]), tmp_path))


def test_a_second_call_is_cached_and_another_pixel_label_or_name_is_not(from_arrays):
    workspace = from_arrays.folder.parents[1]
    assert ingest({"train": (IMAGES, LABELS), "class_names": NAMES}, workspace).cached
    other = IMAGES.copy()
    other[3, 2, 1, 0] ^= 1
    for images, labels, names in ((other, LABELS, NAMES), (IMAGES, LABELS[::-1], NAMES), (IMAGES, LABELS, "ab")):
        assert not ingest({"train": (images, labels), "class_names": names}, workspace).cached


def test_images_of_several_sizes_and_grey_images_are_read_as_files_are(tmp_path):
    images = [RNG.integers(0, 256, (8 + row, 9, 3), dtype=np.uint8) for row in range(12)]
    with pytest.raises(
        SourceError, match=r"images differ in size .* image 1 of data 'train'.* Add a line such as 'size"
    ):
        ingest((images, LABELS[:12]), tmp_path)
    assert ingest((images, LABELS[:12]), tmp_path, size=[6, 4]).manifest.counts["image_shape"] == [6, 4, 3]
    assert ingest((IMAGES[..., :1], LABELS), tmp_path).manifest.counts["image_shape"] == [8, 8, 1]


def test_test_and_validation_images_are_splits(tmp_path):
    pair = (IMAGES, LABELS)
    recipe = {"name": "mine", "data": {}}
    made = lsmix.run(
        recipe, stage="ingest", workspace=tmp_path, data={"train": pair, "validation": pair, "test": Pictures()}
    )
    assert {name: made["ingest"].manifest.counts[name] for name in ("train", "heldout", "test")} == dict.fromkeys(
        ("train", "heldout", "test"), 24
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("photos", r"data 'train': expected \(images, labels\), a data set .*; got str"),
        (iter([]), r"data 'train': expected \(images, labels\)"),
        ((IMAGES, LABELS[1:]), r"data has 24 images but 23 labels"),
        ((IMAGES.astype(np.int64), LABELS), r"image 0 of data 'train': expected uint8, .* got int64 of shape \(8, 8, 3\)"),
        ((IMAGES * 1.0, LABELS), r"image 0 of data 'train': expected uint8, or float in \[0, 1\]"),
        ((IMAGES.reshape(24, -1), LABELS), r"of shape \(192,\)"),
        ((IMAGES, LABELS / 2), r"image 0 of data 'train': expected an integer or a class name as label, got .*0\.0"),
        ((IMAGES, LABELS - 1), r"image 0 of data 'train' has the negative label -1"),
        ({"train": (IMAGES, LABELS), "class_names": ["cat"]}, r"labels that are not among its 1 classes: \['1'\]"),
        ({"all": (IMAGES, LABELS)}, r"the splits are \['all'\]; expected 'train', optionally 'val' and 'test'"),
        ([IMAGES[0]], r"image 0 of data 'train': expected an image and a label, got ndarray"),
        (Pictures(lambda image: RNG.permutation(image)), r"image \d+ of data 'train' has changed since it was first read"),
    ],
)  # fmt: skip
def test_data_that_are_no_labelled_images_are_named(data, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        ingest(data, tmp_path)


def test_data_in_memory_and_files_exclude_each_other(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.path is for files, but data=\.\.\. was passed in Python"):
        ingest((IMAGES, LABELS), tmp_path, path="photos")


def test_the_command_line_says_that_such_data_are_passed_in_python(tmp_path, command):
    (tmp_path / "my.toml").write_text('name = "mine"\n[data]\ntest = 4', encoding="utf-8")
    result = command("status", tmp_path / "my.toml", "--workspace", tmp_path)
    assert result.code == 1
    assert "To use data in memory, call lsmix.run(recipe, data=...) in Python" in result.err


def test_a_pool_of_images_in_memory_is_resumed_and_verified_down_to_its_pixels(tmp_path):
    recipe = tomllib.loads(factory.SMALL_RECIPE)
    recipe["data"] = DATA
    asked = {"workspace": tmp_path / "runs", "stage": "mix", "data": (IMAGES, LABELS)}
    made = lsmix.run(recipe, **asked)
    assert all(item.cached for item in lsmix.run(recipe, **asked).built)
    pool = made["mix"].folder
    assert lsmix.verify(pool, deep=True)["deep"]["pixels_differing"] == 0
    assert lsmix.verify(pool, deep=True, data=made["ingest"].folder)["deep"]["pixels_differing"] == 0


# Recipes made in Python.


def test_a_dictionary_and_a_recipe_equal_the_file(tiny_recipe, tmp_path):
    table = tomllib.loads(tiny_recipe.read_text(encoding="utf-8"))
    table["pools"]["lsmix"]["alpha"] = np.float64(0.4)
    table["data"]["heldout"] = np.int64(30)
    table["runs"]["baseline"]["seeds"] = np.arange(2)
    table["mix"] = {"seed": 3}
    file = tmp_path / "same.toml"
    file.write_text(factory.TINY_RECIPE + "[mix]\nseed = 3\n", encoding="utf-8")
    overrides = ["mix.seed=4", "pools.zero.copies=2"]
    wanted = keys(file, overrides, tmp_path)
    assert keys(table, overrides, tmp_path) == wanted
    assert keys(read_recipe(table), overrides, tmp_path) == wanted
    assert read_recipe(read_recipe(table)) == read_recipe(table)


def keys(recipe, overrides, workspace):
    _, nodes, place = plan(recipe, overrides=overrides, workspace=workspace)
    resolver = Resolver(place)
    fields = [(node.label, resolver.fields(node)) for node in nodes]
    return [*fields, resolver.key(nodes[0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flwo": {}}, r"^recipe: unknown key 'flwo'\. Did you mean 'flow'\?"),
        ({"flow": {"levels": 0}}, r"^recipe: flow\.levels: expected int >= 1, got 0"),
        ({"flow": {"levels": np.float64(2.5)}}, r"^recipe: flow\.levels: expected int, got float"),
        ({"data": {"heldout": float("inf")}}, r"^recipe: data\.heldout: expected a finite number"),
        ({"runs": {"a": {"pool": "b"}}}, r"runs\.a\.pool: there is no pool 'b'"),
    ],
)
def test_a_wrong_dictionary_gets_the_messages_of_a_file(change, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe({"name": "mine", "data": {"format": "digits"}, **change})
    with pytest.raises(RecipeError, match=r"a recipe is a path, a dictionary or a Recipe; got int"):
        read_recipe(3)


def test_relative_paths_of_a_dictionary_start_at_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(read_recipe({"name": "a", "data": {"path": Path("b")}}).data.path) == tmp_path / "b"


def test_an_unknown_stage_is_an_error_of_a_dictionary_too():
    with pytest.raises(LsmixError, match=r"unknown stage 'mixx'\. Did you mean 'mix'\?"):
        lsmix.run({"name": "mine", "data": {"format": "digits"}}, stage="mixx")
