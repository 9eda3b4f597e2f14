"""Laws for every layer: ``inverse`` inverts ``forward``, and the log-determinant is that of the Jacobian."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from lsmix.glow.config import FlowConfig
from lsmix.glow.flow import Flow
from lsmix.glow.layers import ActNorm, AffineCoupling, Conv1x1, log_scale_of
from lsmix.glow.level import FlowLevel, FlowStep

CHANNELS, SIDE = 4, 3


def _perturbed(layer):
    """Perturb all parameters: with their initial values, half of a layer would be the identity."""
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=numbers).to(parameter.dtype)
    return layer


def _conv():
    layer = Conv1x1(CHANNELS)
    layer.reset(np.random.default_rng(0))
    return _perturbed(layer)


def _step():
    layer = FlowStep(CHANNELS, hidden=8, scale="sigmoid")
    layer.reset(np.random.default_rng(0))
    return _perturbed(layer)


def _level(scale="tanh"):
    level = FlowLevel(CHANNELS, steps=3, hidden=8, scale=scale)
    for i, step in enumerate(level.steps()):
        step.reset(np.random.default_rng(i))
    _perturbed(level)
    return level


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "actnorm": lambda: _perturbed(ActNorm(CHANNELS)),
    "conv1x1": _conv,
    "coupling-sigmoid": lambda: _perturbed(AffineCoupling(CHANNELS, hidden=8, scale="sigmoid")),
    "coupling-tanh": lambda: _perturbed(AffineCoupling(CHANNELS, hidden=8, scale="tanh")),
    "step": _step,
    "level": _level,
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)


def _x(batch=2):
    return torch.randn(batch, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@EACH_LAYER
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("gradients", [True, False])
def test_inverse_inverts_forward(name, dtype, tolerance, gradients):
    layer, x = LAYERS[name]().to(dtype), _x().to(dtype)
    kept = x.clone()
    with torch.set_grad_enabled(gradients):
        y, _ = layer(x)
        kept_y = y.clone()
        back = layer.inverse(y)
    # About ten roundings of values near 1: 1e-7 each in float32, 1e-16 in float64, plus a margin for the matrices.
    assert torch.allclose(back, x, atol=tolerance, rtol=0)
    assert torch.equal(x, kept), "forward wrote into its input"
    assert torch.equal(y, kept_y), "inverse wrote into its input"


@EACH_LAYER
def test_log_determinant_matches_the_jacobian(name):
    layer, x = LAYERS[name]().double(), _x(1).double()
    jacobian = torch.autograd.functional.jacobian(lambda flat: layer(flat.reshape(x.shape))[0].flatten(), x.flatten())
    _, log_det = layer(x)
    assert log_det.dtype == torch.float64
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-10)


@pytest.mark.parametrize("scale", ["sigmoid", "tanh"])
def test_log_determinant_of_a_flow_matches_the_jacobian(scale):
    flow = Flow(FlowConfig(height=8, width=4, channels=1, levels=2, steps=2, hidden=4, scale=scale))
    _perturbed(flow.double())
    y = torch.rand(1, 1, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 0.5

    def flat_latent(flat):
        return torch.cat([part.flatten() for part in flow(flat.reshape(y.shape))[0]])

    jacobian = torch.autograd.functional.jacobian(flat_latent, y.flatten())
    _, log_det = flow(y)
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-10)
    z = flat_latent(y.flatten())
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
    assert flow.log_prob_y(y).item() == pytest.approx((log_prior + log_det).item(), abs=1e-10)


def _by_its_steps(level, x):
    """Run a level's layers one after another with torch's gradients."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for step in level.steps():
        x, log_det = step(x)
        total = total + log_det
    return x, total


EACH_SCALE = pytest.mark.parametrize("scale", ["sigmoid", "tanh"])


@EACH_SCALE
@pytest.mark.parametrize("gradients", [True, False])
def test_a_level_equals_its_steps_one_after_another(scale, gradients):
    level, x = _level(scale).double(), _x().double()
    y, log_det = _by_its_steps(level, x)
    with torch.set_grad_enabled(gradients):
        fast_y, fast_log_det = level(x)
    # float64: the same function with a different summation order.
    assert torch.allclose(fast_y, y, atol=1e-13)
    assert torch.allclose(fast_log_det, log_det, atol=1e-12)


@EACH_SCALE
@pytest.mark.parametrize("rebuild", [False, True])
def test_the_manual_gradient_matches_autograd(scale, rebuild):
    level = _level(scale).double()
    level.set_rebuild(rebuild)
    gradients = []
    for run in (level, lambda x: _by_its_steps(level, x)):
        level.zero_grad()
        x = _x().double().requires_grad_()
        y, log_det = run(x)
        weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
        ((y * weights).sum() + (log_det * torch.tensor([1.0, -2.0])).sum()).backward()
        gradients.append({"x": x.grad, **{name: parameter.grad for name, parameter in level.named_parameters()}})
    for name, expected in gradients[1].items():
        assert expected is not None
        assert expected.abs().sum() > 0, name
        # float64, sums of a few hundred terms of size 1 to 10; recomputing adds the rounding of three inverses.
        assert torch.allclose(gradients[0][name], expected, atol=1e-11), name


def test_recomputing_stores_only_a_levels_input_and_output():
    def kept_numbers(steps):
        level = FlowLevel(CHANNELS, steps=steps, hidden=8, scale="tanh")
        level.set_rebuild(True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda x: x):
            level(_x(16).requires_grad_())
        return sum(tensor.numel() for tensor in kept if tensor.ndim == 4 and tensor.shape[0] == 16)

    assert kept_numbers(2) == kept_numbers(8) == 2 * _x(16).numel()  # input and output


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_uses_the_current_parameters_after_every_change(training):
    level, x = _level().double(), _x().double()

    def matches_the_steps():
        with torch.no_grad():
            return torch.allclose(level(x)[0], _by_its_steps(level, x)[0], atol=1e-12)

    level.train(training)
    assert matches_the_steps()
    with torch.no_grad():
        next(level.steps()).actnorm.shift.add_(1.0)
    assert matches_the_steps(), "after a write in place"
    level.load_state_dict({name: value + 0 for name, value in _level().state_dict().items()})
    assert matches_the_steps(), "after loading"
    level.train()
    level(x)[0].square().sum().backward()
    torch.optim.Adam(level.parameters(), lr=0.1, fused=True).step()  # writes without incrementing the version
    assert matches_the_steps(), "after a fused optimiser, still in training"
    level.eval()
    assert matches_the_steps(), "after a fused optimiser, then in evaluation"
    level, x = level.float(), x.float()
    with torch.no_grad():
        assert level(x)[0].dtype == torch.float32


@pytest.mark.parametrize("batch", [16, 64])  # torch uses a different algorithm for small batches
def test_fused_convolutions_are_bit_identical_to_plain_ones(batch, monkeypatch):
    flow = Flow(FlowConfig(height=16, width=16, channels=3, levels=2, steps=2, hidden=32)).eval()
    _perturbed(flow)
    images = np.random.default_rng(0).integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)
    z = flow.encode(images, batch_size=batch)
    decoded = flow.decode(z, batch_size=batch)
    monkeypatch.setattr("lsmix.glow.network._FUSED", None)
    assert np.array_equal(flow.encode(images, batch_size=batch), z)
    assert np.array_equal(flow.decode(z, batch_size=batch), decoded)


def test_actnorm_stays_finite_for_a_constant_channel():
    layer, x = ActNorm(CHANNELS), torch.ones(2, CHANNELS, SIDE, SIDE)
    layer.initialise(x)
    assert torch.isfinite(layer(x)[0]).all()


def test_1x1_convolution_starts_as_a_rotation():
    layer = Conv1x1(12).double()
    layer.reset(np.random.default_rng(0))
    weight = layer.weight()
    assert torch.allclose(weight @ weight.T, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(weight @ layer.inverse_weight(), torch.eye(12, dtype=torch.float64), atol=1e-12)


def test_coupling_scales_by_at_least_one_half():
    raw = torch.tensor([-1e30, -5.0, 0.0, 5.0, 1e30])
    for scale in ("sigmoid", "tanh"):
        layer = AffineCoupling(CHANNELS, hidden=8, scale=scale)
        factors = log_scale_of(raw, layer.scale).exp()
        assert factors.min() >= 0.5
        assert factors.max() <= 1.65  # exp(½)


def test_every_parameter_gets_a_gradient():
    flow = _perturbed(Flow(FlowConfig(height=8, width=8, channels=1, levels=2, steps=2, hidden=4)))
    assert isinstance(flow, Flow)
    flow.log_prob_y(torch.rand(2, 1, 8, 8) - 0.5).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
