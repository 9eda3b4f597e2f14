"""Computations on a device never mix in CPU tensors. Checked without a device, on tensors without data.

A "meta" tensor has a shape and a device; operations that combine it with a CPU tensor raise. Fake "cuda" tensors are
even stricter, but require a build of torch with CUDA.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lsmix.data.mixing import LATENT_METHODS, row_rngs
from lsmix.glow import latent_order
from lsmix.glow.config import FlowConfig
from lsmix.glow.flow import Flow
from lsmix.glow.latent_mixing import is_failed_decode, mix_on_device, zero_fill
from lsmix.glow.latent_order import join_parts, part_shapes, split_parts
from lsmix.glow.pixels import dequantise, draw_noise, quantise
from lsmix.pipeline.stages import pool_builder

Make = Callable[[torch.Tensor], torch.Tensor]
METHODS = LATENT_METHODS.builtin()
SHAPES = part_shapes(8, 8, 1, 2)


@pytest.fixture(params=["meta", "cuda"])
def to_device(request, monkeypatch):
    """Return a function that moves a CPU tensor to a device without computation."""
    if request.param == "meta":
        yield lambda values: values.to("meta")
        return
    if torch.version.cuda is None:
        pytest.skip("fake CUDA tensors need a build of torch with CUDA")
    # Pinned memory is real host memory and needs a real device.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    monkeypatch.setattr(
        latent_order, "_orders", latent_order._orders.__wrapped__
    )  # uncached: the cache would keep fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda values: values.to("cuda")


def test_mixing_in_a_cpu_tensor_is_detected(to_device):
    # Otherwise the tests below would check nothing.
    with pytest.raises(RuntimeError, match="device"):
        torch.where(torch.zeros(3, 4, dtype=torch.bool), to_device(torch.ones(3, 4)), to_device(torch.ones(3, 4)))


@pytest.mark.parametrize("method", METHODS)
def test_methods_mix_on_the_device_and_return_the_shares_of_the_cpu(method, to_device):
    first, second = torch.rand(2, 5, 64)
    lam = np.array([0.0, 0.3, 0.5, 0.999, 1.0])
    with _real():
        _, expected = mix_on_device(method, torch.zeros(5, 64), torch.ones(5, 64), lam, row_rngs(0, "test"))
    mixed, share = mix_on_device(method, to_device(first), to_device(second), lam, row_rngs(0, "test"))
    assert (mixed.device, mixed.shape, mixed.dtype) == (to_device(first).device, first.shape, first.dtype)
    assert share.device.type == "cpu"
    if not isinstance(share, torch._subclasses.FakeTensor):
        assert torch.equal(share, expected)


@pytest.mark.parametrize("back", [False, True])
def test_latents_are_reordered_on_the_device(back, to_device):
    z_BD = to_device(torch.rand(6, 64))
    shapes = tuple(Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=1, hidden=4)).part_shapes)
    turned = pool_builder._reorder(z_BD, np.array([0, 1, 2, 3, 0, 1], np.uint8), shapes, back=back)
    assert (turned.device, turned.shape) == (z_BD.device, z_BD.shape)
    orders = pool_builder._corner_orders(shapes, z_BD.device)
    assert [order.device for order in orders] == [z_BD.device] * 2  # meta tensors accept an index from any device


@pytest.mark.parametrize("mode", ["low-bits", "uniform", "center"])
def test_dequantisation_stays_on_the_device(mode, to_device):
    images = to_device(torch.zeros(3, 8, 8, 1, dtype=torch.uint8))
    noise = to_device(torch.from_numpy(draw_noise(np.random.default_rng(0), (3, 8, 8, 1))))
    y_BCHW = dequantise(images, mode, noise_BHWC=noise)
    assert (y_BCHW.device, y_BCHW.shape, y_BCHW.dtype) == (images.device, (3, 1, 8, 8), torch.float32)


@pytest.mark.parametrize("bits", [5, 8])
def test_quantisation_stays_on_the_device(bits, to_device):
    y_BCHW = to_device(torch.zeros(3, 1, 8, 8))
    images = quantise(y_BCHW, bits)
    assert (images.device, images.shape, images.dtype) == (y_BCHW.device, (3, 8, 8, 1), torch.uint8)


def test_failed_decodes_are_detected_on_the_device(to_device):
    y_BCHW = to_device(torch.zeros(3, 1, 8, 8))
    assert is_failed_decode(y_BCHW, tolerance=0.25, bad_pixel_fraction=0.02).device == y_BCHW.device


def test_latents_are_joined_and_split_on_the_device(to_device):
    z_BD = to_device(torch.rand(3, 64))
    parts = split_parts(z_BD, SHAPES)
    assert [part.device for part in parts] == [z_BD.device] * len(SHAPES)
    again = join_parts(parts)
    assert (again.device, again.shape) == (z_BD.device, z_BD.shape)


def test_components_are_set_to_zero_on_the_device(to_device):
    z_BD = to_device(torch.rand(3, 64))
    assert zero_fill(z_BD, 10).device == z_BD.device


@contextlib.contextmanager
def _real():
    """Use real tensors inside the block, in any mode."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield
