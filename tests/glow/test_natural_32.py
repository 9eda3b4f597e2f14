"""The flow that ships with lsmix is found by name, exact on photographs, and small."""

from pathlib import Path

import numpy as np
import pytest

import lsmix
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.stages.graph import build_graph
from lsmix.pipeline.workspace.workspace import Workspace


@pytest.fixture(scope="module")
def flow():
    return lsmix.load_flow("natural-32")


def test_photographs_decode_exactly_and_are_more_likely_than_noise(flow, shared_data):
    from PIL import Image

    sheet = np.asarray(Image.open(shared_data / "cifar10_test_0.webp").convert("RGB"))
    images = sheet.reshape(-1, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)[:64]
    assert np.array_equal(flow.decode(flow.encode(images)), images)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    bits, noise_bits = (flow.bits_per_dim(flow.log_prob(x, dequantise="uniform")).mean() for x in (images, noise))
    assert bits < 2.0
    assert noise_bits > 4.0


def test_a_recipe_can_use_it_by_name_without_training(tmp_path):
    recipe = tmp_path / "my.toml"
    recipe.write_text('name = "x"\n[data]\nformat = "digits"\n[flow]\npath = "natural-32"\n[pools.p]\ncopies = 1\n')
    nodes = build_graph(read_recipe(recipe), Workspace(tmp_path / "runs"))
    assert [node.stage.name for node in nodes] == ["ingest", "encode", "mix", "report"]
    assert nodes[1].inputs["flow"].manifest.name == "natural-32"


def test_it_is_small():
    folder = Path(lsmix.__file__).parent / "data" / "flows" / "natural-32"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
