"""``flow.start_from``: training starts from the weights of a finished flow."""

import numpy as np
import pytest
import torch

import lsmix
from lsmix.data.errors import RecipeError
from lsmix.data.progress import NullProgress
from lsmix.pipeline.config.recipe import read_recipe

MORE = ["flow.training.seed=9", "flow.training.iterations=12"]


def train(recipe, workspace, start, *overrides, **options):
    settings = [f'flow.start_from="{start}"', *MORE, *overrides]
    return lsmix.run(recipe, workspace=workspace, stage="train-glow", overrides=settings, device="cpu", **options)


class StopAt(NullProgress):
    """Interrupt training at a step."""

    def __init__(self, step):
        self.left = step

    def advance(self, units=1, note=""):
        self.left -= units
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def started(tiny_recipe, finished_workspace, tmp_path_factory):
    """Return the finished flow and a flow whose training started from it."""
    start = next((finished_workspace / "train-glow").iterdir())
    return start, train(tiny_recipe, tmp_path_factory.mktemp("started"), start)["train-glow"]


def test_training_starts_from_the_weights_and_records_the_flow_as_its_input(tiny_recipe, started, tmp_path):
    start, made = started
    given = lsmix.load_flow(start).state_dict()
    one = train(tiny_recipe, tmp_path, start, "flow.training.iterations=1", "flow.training.learning_rate=1e-9")
    after = lsmix.load_flow(one["train-glow"].folder).state_dict()
    assert all(torch.allclose(given[name].double(), after[name].double(), atol=1e-7) for name in given)
    records = {record.role: record for record in made.manifest.inputs}
    assert records["start"].cache_key == start.name[-12:]
    assert lsmix.verify(made.folder)["files"] == len(made.manifest.files)
    first = (made.folder / "log.jsonl").read_text().splitlines()[0]
    assert '"iteration":1,' in first


def test_resumed_training_produces_the_bytes_of_uninterrupted_training(tiny_recipe, started, tmp_path):
    start, made = started
    with pytest.raises(KeyboardInterrupt):
        train(tiny_recipe, tmp_path, start, progress=StopAt(11))
    assert list(tmp_path.glob("train-glow/*/work/checkpoint.safetensors"))
    resumed = train(tiny_recipe, tmp_path, start)["train-glow"]
    assert (resumed.cache_key, resumed.manifest.content_digest) == (made.cache_key, made.manifest.content_digest)


def test_the_flow_is_found_by_name_and_determines_the_cache_key(tiny_recipe, tiny_workspace, started):
    start, made = started
    assert train(tiny_recipe, tiny_workspace, start.name)["train-glow"].cache_key == made.cache_key
    chained = train(tiny_recipe, tiny_workspace, made.folder)["train-glow"]
    assert chained.cache_key != made.cache_key


def test_a_flow_of_another_architecture_is_rejected_in_advance(tiny_recipe, started, tmp_path):
    start, _ = started
    message = r"flow\.start_from: .* differs from \[flow\]\. To start from it, set flow\.levels = 2, flow\.steps = 2\."
    with pytest.raises(RecipeError, match=message):
        train(tiny_recipe, tmp_path, start, "flow.levels=1", "flow.steps=3")
    assert not list(tmp_path.iterdir())
    rgb = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 2
    recipe = read_recipe(tiny_recipe, ["data={}", "data.test=4"])
    with pytest.raises(RecipeError, match=r"is a flow for images with 1 channel, but this data set has 3"):
        train(recipe, tmp_path, start, data=rgb)


def test_a_flow_is_either_used_unchanged_or_trained_further(tiny_recipe):
    with pytest.raises(RecipeError, match=r"flow\.start_from: the flow of 'flow\.path' is used as it is"):
        read_recipe(tiny_recipe, ["flow.path=a", "flow.start_from=b"])
    with pytest.raises(
        RecipeError, match=r"expected int >= 1, got 0\. 'flow\.path' names a flow that is used as it is"
    ):
        read_recipe(tiny_recipe, ["flow.training.iterations=0"])
