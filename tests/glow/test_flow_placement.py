"""A flow computes everything on its own device; tested without such a device.

torch's ``meta`` device computes only shapes, types and devices, and rejects mixed devices. Fake tensors that claim to be
on a GPU do the same; they need a build of torch with CUDA, but no GPU.
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

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # read to detect moves

CONFIG = FlowConfig(height=7, width=8, channels=3, levels=2, steps=2, hidden=8)
BATCH = 4


@pytest.fixture(params=["meta", "cuda"])
def device(request, monkeypatch):
    """Return a device without computation: ``meta``, or a GPU of fake tensors."""
    latent_order._orders.cache_clear()
    if request.param == "meta":
        yield torch.device("meta")
    else:
        if torch.version.cuda is None:
            pytest.skip("fake CUDA tensors need a build of torch with CUDA")
        monkeypatch.setattr(cuda_graph, "_RECORDED_ON", frozenset())
        monkeypatch.setattr(network, "_NOT_IN_CUDNN", set())
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.device("cuda", 0)
    latent_order._orders.cache_clear()  # it contains fake tensors


@pytest.fixture
def flow(device):
    """Return a flow on the device."""
    return _flow(CONFIG, device)


def _flow(config, device):
    with device:  # moving a module there afterwards would need the real device
        return Flow(config, seed=None)


def _noise(device, *shape):
    return torch.empty(shape, device=device)


def _is_on(value, device, *shape):
    assert value.device == device
    assert value.shape == shape


@pytest.mark.parametrize("scale", ["tanh", "sigmoid"])
def test_encoding_and_decoding_stay_on_the_device(device, scale):
    config = FlowConfig(height=7, width=8, channels=3, levels=2, steps=2, hidden=8, scale=scale)
    flow = _flow(config, device).eval()
    z, log_prob = flow.encode_batch(_noise(device, BATCH, 3, 7, 8))
    _is_on(z, device, BATCH, flow.dim)
    _is_on(log_prob, device, BATCH)
    assert log_prob.dtype == torch.float64
    _is_on(flow.decode_batch(z), device, BATCH, 3, 7, 8)


@pytest.mark.parametrize("gradients", [False, True])
def test_both_directions_stay_on_the_device_with_and_without_gradients(device, flow, gradients):
    with torch.set_grad_enabled(gradients):
        parts, log_det = flow(_noise(device, BATCH, 3, 8, 8))
        _is_on(log_det, device, BATCH)
        _is_on(flow.inverse(parts), device, BATCH, 3, 8, 8)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_stay_on_the_device(device, flow, light, dtype):
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch's autograd needs the real device, even for fake tensors")
    flow.set_network_dtype(dtype)
    flow.initialise(_noise(device, BATCH, 3, 8, 8))
    flow.set_rebuild(light)
    flow.log_prob_y(_noise(device, BATCH, 3, 8, 8)).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        _is_on(parameter.grad, device, *parameter.shape)


def test_clipping_and_the_update_stay_on_the_gpu(device, flow):
    if device.type == "meta":
        pytest.skip("torch's fused Adam does not support the meta device")
    trainer = FlowTrainer(flow, FlowTraining(batch_size=BATCH), np.zeros((BATCH, 7, 8, 3), np.uint8))

    def loss(y_BCHW):
        for parameter in flow.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), dtype=torch.float64, device=device)

    trainer._loss = loss
    trainer._place()
    (measured,) = trainer._apply(_noise(device, BATCH, 3, 8, 8))
    _is_on(measured, device, 2)
    moments = [value for state in trainer._adam.state.values() for value in state.values()]
    assert moments
    assert all(value.device == device for value in [*moments, trainer._broken])
