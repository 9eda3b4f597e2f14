"""A coupling network's convolutions as matrix products, which CUDA takes in full float32: the same numbers for every shape."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from lsmix.glow import network
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer

counts = st.integers(1, 5)


def _numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@given(counts, counts, counts, counts, counts, st.booleans())
def test_products_are_convolutions(batch, inputs, outputs, height, width, channels_last):
    x, bias = _numbers(batch, inputs, height, width), _numbers(outputs)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for size in (1, 3):
        weight = _numbers(outputs, inputs, size, size)
        expected = F.conv2d(x, weight, bias, padding=size // 2)
        if size == 3:
            torch.testing.assert_close(network._by_taps(x, weight, bias), expected)
        else:
            torch.testing.assert_close(network._pixelwise(x, weight, bias, relu=False), expected)
            torch.testing.assert_close(network._pixelwise(x, weight, bias, relu=True), expected.relu())


@given(counts, counts, counts, counts, counts)
def test_a_weight_gradient_by_neighbours_is_that_of_the_convolution(batch, inputs, outputs, height, width):
    x, g = _numbers(batch, inputs, height, width), _numbers(batch, outputs, height, width)
    weight = _numbers(outputs, inputs, 3, 3).requires_grad_()
    F.conv2d(x, weight, padding=1).backward(g)
    torch.testing.assert_close(network._weight_gradient(g, x), weight.grad)


@pytest.fixture
def multiplied(monkeypatch):
    """Let the CPU multiply where CUDA does; return the shapes of the weights that it did so with."""
    asked = []

    def is_better(x_BCHW, weight):
        better = weight.shape[2] == 1 or len(weight) < weight.shape[1]
        if better:
            asked.append(weight.shape)
        return better

    monkeypatch.setattr(network, "_is_better_multiplied", is_better)
    return asked


def test_both_directions_multiply_and_every_image_comes_back(multiplied):
    flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=16))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    z = flow.eval().encode(images, batch_size=20)
    there = sorted(multiplied)
    assert len(there) == 2 * 2 * 2  # the second and the third convolution of two steps of two levels
    multiplied.clear()
    assert np.array_equal(flow.decode(z, batch_size=20), images)
    assert sorted(multiplied) == there


def test_training_with_matrix_products_equals_training_with_convolutions(request, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)

    def trained():
        flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=16))
        trainer = FlowTrainer(flow, FlowTraining(batch_size=8), images)
        trainer.steps(4)
        return trainer.state_dict()

    expected = trained()
    request.getfixturevalue("multiplied")
    as_on_cuda = lambda rows: (rows.new_ones(1, len(rows)) @ rows)[0]  # noqa: E731 - one line
    monkeypatch.setattr(network, "_channel_sums", lambda g_BCHW: as_on_cuda(network.pixel_rows(g_BCHW)))
    # Adam turns a gradient near 0, of either sign, into a step of the learning rate.
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    for name, value in trained().items():
        close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
