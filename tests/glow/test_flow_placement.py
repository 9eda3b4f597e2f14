"""A flow computes everything on its own device, tested without having that device.

torch's ``meta`` device computes shapes, types and devices only, and refuses to mix devices; so do fake tensors that claim
to be on a GPU, which need a build of torch for CUDA, but no GPU.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lsmix.data.loaders import cuda_graph
from lsmix.glow import latent_order, network
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.training import FlowTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # to see whether it moved

CONFIG = FlowConfig(height=7, width=8, channels=3, levels=2, steps=2, hidden=8)
BATCH = 4


@pytest.fixture(params=["meta", "cuda"])
def place(request, monkeypatch):
    """Return a device that computes no numbers: ``meta``, or a GPU of fake tensors."""
    latent_order._orders.cache_clear()
    if request.param == "meta":
        yield torch.device("meta")
    else:
        if torch.version.cuda is None:
            pytest.skip("this torch is built without CUDA, and cannot fake it")
        monkeypatch.setattr(cuda_graph, "_RECORDED_ON", frozenset())
        monkeypatch.setattr(network, "_NOT_IN_CUDNN", set())
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.device("cuda", 0)
    latent_order._orders.cache_clear()  # what it keeps is fake


@pytest.fixture
def flow(place):
    """Return a flow in that place."""
    return _flow(CONFIG, place)


def _flow(config, place):
    with place:  # a module that is moved there afterwards would ask for the device itself
        return Flow(config, seed=None)


def _noise(place, *shape):
    return torch.empty(shape, device=place)


def _is_on(value, place, *shape):
    assert value.device == place
    assert value.shape == shape


@pytest.mark.parametrize("scale", ["tanh", "sigmoid"])
def test_encoding_and_decoding_stay_on_the_device(place, scale):
    config = FlowConfig(height=7, width=8, channels=3, levels=2, steps=2, hidden=8, scale=scale)
    flow = _flow(config, place).eval()
    z, log_prob = flow.encode_batch(_noise(place, BATCH, 3, 7, 8))
    _is_on(z, place, BATCH, flow.dim)
    _is_on(log_prob, place, BATCH)
    assert log_prob.dtype == torch.float64
    _is_on(flow.decode_batch(z), place, BATCH, 3, 7, 8)


@pytest.mark.parametrize("gradients", [False, True])
def test_both_directions_stay_on_the_device_with_and_without_gradients(place, flow, gradients):
    with torch.set_grad_enabled(gradients):
        parts, log_det = flow(_noise(place, BATCH, 3, 8, 8))
        _is_on(log_det, place, BATCH)
        _is_on(flow.inverse(parts), place, BATCH, 3, 8, 8)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_stay_on_the_device(place, flow, light, dtype):
    if place.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch's autograd asks for the device itself, even for fake tensors")
    flow.set_network_dtype(dtype)
    flow.initialise(_noise(place, BATCH, 3, 8, 8))
    flow.set_rebuild(light)
    flow.log_prob_y(_noise(place, BATCH, 3, 8, 8)).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        _is_on(parameter.grad, place, *parameter.shape)


def test_clipping_and_the_update_stay_on_the_gpu(place, flow):
    if place.type == "meta":
        pytest.skip("torch's fused Adam takes no tensors of the meta device")
    trainer = FlowTrainer(flow, FlowTraining(batch_size=BATCH), np.zeros((BATCH, 7, 8, 3), np.uint8))

    def loss(y_BCHW):
        for parameter in flow.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), dtype=torch.float64, device=place)

    trainer._loss = loss
    trainer._place()
    (measured,) = trainer._apply(_noise(place, BATCH, 3, 8, 8))
    _is_on(measured, place, 2)
    moments = [value for state in trainer._adam.state.values() for value in state.values()]
    assert moments
    assert all(value.device == place for value in [*moments, trainer._broken])
