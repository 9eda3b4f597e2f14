"""Trained weights are restored exactly, and only into the matching network."""

import numpy as np
import pytest
import torch

from lsmix.classifiers.checkpoint import load_classifier, save_classifier
from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.normalise import channel_statistics
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.pipeline.api import run
from lsmix.pipeline.config.recipe import read_recipe
from lsmix.pipeline.config.results import DATASET_FILE, read_metrics

SHAPE = (8, 8, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), dtype=np.uint8)


@pytest.mark.parametrize("normalise", ["none", "channel"])
def test_loaded_weights_produce_the_same_logits_and_bytes(tmp_path, normalise):
    config = ClassifierTraining(architecture="wrn-10-1", normalise=normalise)
    trained = ClassifierTrainer(config, 5, SHAPE, seed=3, statistics=channel_statistics(IMAGES)).model.eval()
    save_classifier(tmp_path / "w.safetensors", trained)
    state = torch.random.get_rng_state()
    loaded = load_classifier(tmp_path / "w.safetensors", config, 5, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        assert torch.equal(loaded(x), trained(x))
    save_classifier(tmp_path / "again.safetensors", loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_the_weights_of_a_finished_run_reproduce_its_error(tmp_path):
    recipe = tmp_path / "my.toml"
    recipe.write_text(
        'name = "wide"\n[data]\nformat = "digits"\nlimit = 200\ntest = 90\n'
        '[classifier]\narchitecture = "wrn-10-1"\noptimiser = "sgd"\nlearning_rate = 0.05\nweight_decay = 5e-4\n'
        'grad_clip = 5.0\nnormalise = "channel"\nepochs = 2\nbatch_size = 32\nthreads = 1\nflip = false\n'
        "[runs.baseline]\n",
        encoding="utf-8",
    )
    result = run(recipe, workspace=tmp_path / "runs", device="cpu", stage="train")
    folder = result["train/baseline-seed0"].folder
    dataset = open_dataset(result["ingest"].folder / DATASET_FILE)
    config = read_recipe(recipe).run_config("baseline", 0)
    model = load_classifier(folder / "classifier.safetensors", config, 10, dataset.image_shape)
    logits = model(torch.from_numpy(dataset.test.images[:].copy()).permute(0, 3, 1, 2).float() / 255)
    error = 100 * (logits.argmax(dim=1).numpy() != dataset.test.labels[:]).mean()
    assert error == pytest.approx(read_metrics(folder)[-1].test_error)
    mean = channel_statistics(dataset.train.images)[0]
    np.testing.assert_allclose(model.get_buffer("mean").numpy(), mean, rtol=1e-6)


def test_tied_weights_are_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_classifier(tmp_path / "w.safetensors", model)
    assert (tmp_path / "w.safetensors").stat().st_size > 2 * 4 * 16


@pytest.mark.parametrize(
    ("fields", "classes", "message"),
    [
        (
            {"width": 8},
            5,
            r"tensor 'features\.0\.0\.weight' .*expected torch\.float32 \(8, 3, 3, 3\), got .*\(4, 3, 3, 3\)",
        ),
        ({"width": 4}, 6, r"tensor 'head\.weight' .*\(6, 4\), got torch\.float32 \(5, 4\)"),
        ({"width": 4, "final_batch_norm": True}, 5, r"lacks tensor 'head_norm\.bias'"),
        ({"width": 4, "normalise": "channel"}, 5, r"lacks tensor 'mean'"),
    ],
)
def test_weights_of_another_network_are_rejected(tmp_path, fields, classes, message):
    path = tmp_path / "w.safetensors"
    save_classifier(path, ClassifierTrainer(ClassifierTraining(width=4), 5, SHAPE, seed=0).model)
    with pytest.raises(FormatError, match=message) as caught:
        load_classifier(path, ClassifierTraining(**fields), classes, SHAPE)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_damaged_file_are_distinguished(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(MissingError, match="does not exist"):
        load_classifier(path, ClassifierTraining(width=4), 5, SHAPE)
    save_classifier(path, ClassifierTrainer(ClassifierTraining(width=4), 5, SHAPE, seed=0).model)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="is damaged"):
        load_classifier(path, ClassifierTraining(width=4), 5, SHAPE)
