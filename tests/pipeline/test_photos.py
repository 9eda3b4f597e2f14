"""``lsmix demo --photos``, and training that starts from the flow natural-32."""

import numpy as np
import pytest
from PIL import Image

import lsmix
from lsmix.data.errors import MissingError, RecipeError
from lsmix.data.progress import NullProgress
from lsmix.pipeline import photos
from lsmix.pipeline.photos import photos_recipe

RNG = np.random.default_rng(0)


def put(path, width=40, height=36):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def test_photos_without_labels_are_mixed_into_a_sheet(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(photos, "_COPIES", 1)
    for row in range(5):
        put(tmp_path / f"mine/{row}.{('png', 'jpg', 'webp')[row % 3]}", 40 + row)
    (tmp_path / "mine/broken.jpg").write_bytes(b"no image")
    result = command("demo", "--photos", "mine", "-q", "--device", "cpu")
    assert result.code == 0
    assert "warning: skipped 1 unreadable image: broken.jpg" in result.err
    assert result.out.splitlines()[-1] == f"sheet       {tmp_path / 'photos.png'}"
    with Image.open(tmp_path / "photos.png") as sheet:
        assert sheet.width > sheet.height / 3
    assert command("demo", "--photos", "mine", "-q", "--dry-run").out.count("cached") == 4


def test_photos_in_class_folders_are_compared_by_classifiers(tmp_path):
    for row in range(40):
        put(tmp_path / f"{'ab'[row % 2]}/{row}.png")
    recipe, data = photos_recipe(tmp_path, NullProgress())
    assert data is None
    assert list(recipe["runs"]) == ["baseline", "cutmix", "lsmix", "cutmix-lsmix"]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_photos_is_rejected(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match="photo"):
        photos_recipe(tmp_path / name, NullProgress())


def test_training_starts_from_the_bundled_flow(tmp_path):
    images = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    training = {"iterations": 1, "batch_size": 2, "warmup": 0}
    recipe = {"name": "own", "data": {"test": 2}, "flow": {"start_from": "natural-32", "training": training}}
    with pytest.raises(RecipeError, match=r"set flow\.steps = 8, flow\.hidden = 96"):
        lsmix.run(recipe, workspace=tmp_path, data=(images, np.arange(12) % 2), stage="train-glow")
    recipe["flow"] |= {"levels": 3, "steps": 8, "hidden": 96, "threads": 1}
    result = lsmix.run(recipe, workspace=tmp_path, data=(images, np.arange(12) % 2), stage="train-glow", device="cpu")
    records = {record.role: record.content_digest for record in result["train-glow"].manifest.inputs}
    assert sorted(records) == ["dataset", "start"]
