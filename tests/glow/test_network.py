"""Convolutions as matrix products, used on CUDA in full float32, give the same results for every shape."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - torch's convention

from lsmix.glow import network
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer

counts = st.integers(1, 5)


def _numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@given(counts, counts, counts, counts, counts, st.booleans())
def test_matrix_products_match_convolutions(batch, inputs, outputs, height, width, channels_last):
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
def test_the_weight_gradient_matches_autograd(batch, inputs, outputs, height, width):
    x, g = _numbers(batch, inputs, height, width), _numbers(batch, outputs, height, width)
    weight = _numbers(outputs, inputs, 3, 3).requires_grad_()
    F.conv2d(x, weight, padding=1).backward(g)
    torch.testing.assert_close(network._weight_gradient(g, x), weight.grad)


@pytest.fixture
def multiplied(monkeypatch):
    """Use matrix products on the CPU as on CUDA; return the shapes of the weights that they were used for."""
    shapes = []

    def is_faster(x_BCHW, weight):
        faster = weight.shape[2] == 1 or len(weight) < weight.shape[1]
        if faster:
            shapes.append(weight.shape)
        return faster

    monkeypatch.setattr(network, "_is_matmul_faster", is_faster)
    return shapes


def test_both_directions_use_matrix_products_and_restore_every_image(multiplied):
    flow = Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=16))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    z = flow.eval().encode(images, batch_size=20)
    in_encode = sorted(multiplied)
    assert len(in_encode) == 2 * 2 * 2  # second and third convolution of two steps in two levels
    multiplied.clear()
    assert np.array_equal(flow.decode(z, batch_size=20), images)
    assert sorted(multiplied) == in_encode


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
    # Adam turns a gradient near 0, whatever its sign, into a step as large as the learning rate.
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    for name, value in trained().items():
        close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
