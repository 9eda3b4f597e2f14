"""Classifiers train, evaluate and resume exactly in each precision, and restore torch's settings."""

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lsmix.classifiers import training
from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.evaluation import features
from lsmix.classifiers.normalise import channel_statistics
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.readers.digits import read_digits
from lsmix.pipeline.api import run

CNN = {"width": 12, "learning_rate": 5e-3}
WIDE = {"architecture": "wrn-10-1", "learning_rate": 2e-3}
SGD = {"optimiser": "sgd", "learning_rate": 0.05, "grad_clip": 5.0}
NETWORKS = {
    "cnn-13": CNN,
    "cnn-13 on SVHN": {**CNN, "final_batch_norm": True, "normalise": "channel"},
    "wide sgd": {**WIDE, **SGD, "normalise": "channel"},
}
every_network = pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)


@pytest.fixture(scope="module")
def digits():
    train = read_digits().splits["train"]
    return train.images[:640], train.labels[:640]


def trainer(digits, **fields):
    config = ClassifierTraining(**{"epochs": 3, "batch_size": 16, "flip": False, "translate": 0, **fields})
    return ClassifierTrainer(config, 10, (8, 8, 1), seed=0, statistics=channel_statistics(digits[0]))


def source(digits):
    return ArrayLoader(digits[0][:512], digits[1][:512], 16)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("precision", ["float32", "bf16"])  # on a CPU, tf32 equals float32: see below
@every_network
def test_each_classifier_learns_and_resumes_exactly_in_each_precision(fields, precision, digits):
    straight, resumed = (trainer(digits, **fields, precision=precision) for _ in range(2))
    errors = []
    for _ in range(2):
        straight.run_epoch(source(digits))
        errors.append(straight.evaluate(digits[0][512:], digits[1][512:]))
        if straight.epoch == 1:
            kept = save(straight.state_dict())
    assert errors[-1] < 60, errors  # chance is 90
    floats = {tensor.dtype for tensor in straight.state_dict().values() if tensor.is_floating_point()}
    assert floats == {torch.float32}  # weights, batch norm statistics and moments
    resumed.load_state_dict(load(kept))
    resumed.run_epoch(source(digits))
    assert same(resumed.state_dict(), straight.state_dict())
    seen = features(straight.model, digits[0][:300], precision=precision)
    assert seen.dtype == np.float32
    assert np.isfinite(seen).all()


@every_network
def test_tf32_equals_float32_on_the_cpu_and_bf16_does_not(fields, digits):
    states = []
    for precision in ("float32", "tf32", "bf16"):
        learner = trainer(digits, **fields, precision=precision)
        learner.run_epoch(ArrayLoader(digits[0][:96], digits[1][:96], 32))
        states.append(learner.state_dict())
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_evaluation_in_bfloat16_uses_unrounded_statistics():
    torch.manual_seed(0)
    learner = ClassifierTrainer(ClassifierTraining(width=4), 10, (8, 8, 1), seed=0)
    norm = next(module for module in learner.model.modules() if isinstance(module, nn.BatchNorm2d))
    # Mean 8.02, standard deviation 0.02: rounded to bfloat16, the mean would be 8, one standard deviation off.
    x = 8.02 + 0.02 * torch.randn(64, 4, 6, 6)
    for _ in range(3):
        norm(x)
    norm.eval()
    rounded = torch.full((2, 4, 6, 6), 8.0, dtype=torch.bfloat16)
    # The result is bfloat16, which has 8 bits.
    torch.testing.assert_close(norm(rounded).float(), norm(rounded.float()), rtol=2**-7, atol=2**-7)
    assert norm(rounded).float().mean() < -0.5


# Torch's settings.


def _operators():
    cudnn, cuda, cpu = (getattr(torch.backends, name) for name in ("cudnn", "cuda", "mkldnn"))
    return [cudnn.conv, cudnn.rnn, cuda.matmul, cpu.conv, cpu.rnn, cpu.matmul]


def _settings():
    cudnn = torch.backends.cudnn
    return [*(operator.fp32_precision for operator in _operators()), cudnn.deterministic, cudnn.benchmark]


@contextmanager
def _callers_precision(value):
    """Act as a caller that sets the precision of all operators; restore the settings afterwards."""
    before = torch.backends.fp32_precision, [operator.fp32_precision for operator in _operators()]
    torch.backends.fp32_precision = value
    try:
        yield
    finally:
        torch.backends.fp32_precision = before[0]
        for operator, kept in zip(_operators(), before[1], strict=True):
            operator.fp32_precision = kept


@pytest.mark.parametrize("callers", ["ieee", "tf32"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_callers_precision_has_no_effect_and_is_restored(callers, precision, digits):
    def trained():
        learner = trainer(digits, **CNN, precision=precision)
        learner.run_epoch(ArrayLoader(digits[0][:64], digits[1][:64], 32))
        learner.evaluate(*digits)
        return learner.state_dict()

    expected = trained()
    with _callers_precision(callers):
        before = _settings()
        assert same(trained(), expected)
        assert _settings() == before


@pytest.mark.parametrize(("precision", "on_cuda"), [("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_the_precision_of_each_operator_is_set_and_restored(precision, on_cuda):
    before = _settings()
    with arithmetic(precision):
        assert _settings() == [on_cuda] * 3 + ["ieee"] * 3 + [True, False]
    assert _settings() == before
    with arithmetic(precision, convolutions_only=True):
        assert [operator.fp32_precision for operator in _operators()].count(on_cuda) == (
            2 if precision == "tf32" else 6
        )
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    with pytest.raises(ZeroDivisionError), arithmetic(precision):
        _ = 1 // 0
    assert _settings() == before


# Memory of a finished stage.


def test_finished_training_releases_its_model(small_recipe, small_workspace, monkeypatch):
    models = []

    class Watched(ClassifierTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            models.append(weakref.ref(self.model))

    monkeypatch.setattr(training, "ClassifierTrainer", Watched)
    gc.disable()  # objects that need the collector would keep GPU memory until it runs
    try:
        run(small_recipe, workspace=small_workspace, stage="train", device="cpu", force="train")
        assert models
        assert [model() for model in models] == [None] * len(models)
    finally:
        gc.enable()
