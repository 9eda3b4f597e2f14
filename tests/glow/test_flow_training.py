"""Training of a flow: resumed equals uninterrupted training bit for bit, and diverged steps are not applied."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lsmix.data.errors import DivergedError, FormatError, RecipeError
from lsmix.glow.config import FlowConfig, FlowTraining
from lsmix.glow.flow import Flow
from lsmix.glow.layers import space_to_depth
from lsmix.glow.training import FlowTrainer, augment, learning_rate

CONFIG = FlowConfig(height=6, width=4, channels=1, levels=2, steps=2, hidden=8)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 4, 1), dtype=np.uint8)
TRAINING = FlowTraining(batch_size=8, learning_rate=1e-2, warmup=3, weight_decay=1e-5)


def _trainer(training=TRAINING):
    return FlowTrainer(Flow(CONFIG), training, IMAGES)


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_resumed_training_equals_uninterrupted_training(stop):
    uninterrupted = _trainer()
    results = [uninterrupted.step() for _ in range(6)]
    first = _trainer()
    assert [first.step() for _ in range(stop)] == results[:stop]
    stored = save(first.state_dict())
    second = FlowTrainer(Flow(CONFIG, seed=99), TRAINING, IMAGES)
    second.load_state_dict(load(stored))
    assert second.iteration == stop
    assert [second.step() for _ in range(stop, 6)] == results[stop:]
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_only_the_first_step_initialises_actnorm(monkeypatch):
    calls = []
    initialise = Flow.initialise
    monkeypatch.setattr(Flow, "initialise", lambda flow, y: (calls.append(1), initialise(flow, y))[1])
    trainer = _trainer()
    trainer.step()
    trainer.step()
    resumed = _trainer()
    resumed.load_state_dict(trainer.state_dict())
    resumed.step()
    FlowTrainer(trainer.flow, TRAINING, IMAGES).step()  # a new trainer; the flow itself is initialised
    assert len(calls) == 1


def test_initialisation_gives_every_actnorm_mean_zero_and_variance_one():
    flow = Flow(CONFIG)
    y = torch.rand(32, 1, 8, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    flow.initialise(y)
    seen = []
    h = y
    for level in flow._levels():
        h = space_to_depth(h)
        for step in level.steps():
            seen.append(step.actnorm(h)[0])
            h = step(h)[0]
        h = h.chunk(2, dim=1)[1]
    assert len(seen) == 4
    for out in seen:
        # float32 parameters, and one rounding in each earlier layer.
        assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-5)
        assert torch.allclose(out.var((0, 2, 3), correction=0), torch.ones(out.shape[1]), atol=1e-5)


def test_training_lowers_the_training_and_evaluation_losses():
    flat = np.sort(IMAGES, axis=2)  # sorted rows are learnable, noise is not
    training = FlowTraining(batch_size=20, learning_rate=3e-3, translate=0, flip=False)
    trainer = FlowTrainer(Flow(CONFIG), training, flat)
    first = trainer.step().loss_bits_per_dim
    before = trainer.evaluate(flat)
    for _ in range(40):
        last = trainer.step()
    after = trainer.evaluate(flat)
    assert last.loss_bits_per_dim < first
    assert after < before
    assert trainer.evaluate(flat) == after, "evaluation is seeded"


def test_evaluation_does_not_change_training():
    plain, evaluated = _trainer(), _trainer()
    for _ in range(3):
        evaluated.evaluate(IMAGES)
        assert plain.step() == evaluated.step()


@pytest.mark.parametrize("poisoned", ["bias_out", "weight_in"])
def test_a_diverged_step_is_not_applied(poisoned):
    trainer = _trainer()
    trainer.step()
    with torch.no_grad():
        getattr(next(trainer.flow._levels()[0].steps()).coupling, poisoned).fill_(torch.nan)
    before = trainer.state_dict()
    with pytest.raises(DivergedError, match=r"diverged at iteration 1: .* The update was not applied"):
        trainer.step()
    assert trainer.iteration == 1
    for name, value in trainer.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_each_epoch_uses_every_image_once():
    trainer = _trainer()  # batches of 8 over 20 images: 5 batches are 2 epochs, and one batch spans both
    rows = np.concatenate([trainer._rows(i) for i in range(5)])
    assert [len(trainer._rows(i)) for i in range(5)] == [8] * 5
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    assert not np.array_equal(rows[:20], rows[20:])
    times_seen = np.bincount(_trainer(FlowTraining(batch_size=50))._rows(0))
    assert sorted(times_seen) == [2] * 10 + [3] * 10  # two and a half epochs in one batch


@settings(deadline=None)
@given(translate=st.integers(0, 3), flip=st.booleans(), seed=st.integers(0, 1000))
def test_augmented_images_are_shifted_and_mirrored_originals(translate, flip, seed):
    images = np.random.default_rng(seed).integers(1, 256, (4, 5, 6, 2), dtype=np.uint8)
    t = translate
    for image, out in zip(images, augment(images, np.random.default_rng(seed), translate=t, flip=flip), strict=True):
        framed = np.pad(image, ((t, t), (t, t), (0, 0)))
        shifts = [framed[i : i + 5, j : j + 6] for i in range(2 * t + 1) for j in range(2 * t + 1)]
        mirrored = [shift[:, ::-1] for shift in shifts] if flip else []
        assert any(np.array_equal(out, candidate) for candidate in shifts + mirrored)


def test_the_learning_rate_warms_up_linearly():
    trainer = _trainer(FlowTraining(batch_size=8, learning_rate=0.3, warmup=3))
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(trainer._adam.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_memory_light_training_is_close_to_plain_training():
    plain, light = _trainer(), _trainer(msgspec.structs.replace(TRAINING, memory_light=True))
    # float32; recomputed inputs differ in their last bits, and so do gradients.
    for _ in range(4):
        assert light.step().loss_bits_per_dim == pytest.approx(plain.step().loss_bits_per_dim, abs=1e-4)
    assert not light.flow._levels()[0].rebuild, "later uses of this flow would be slower"


def test_bfloat16_networks_train_close_to_float32():
    exact, coarse = _trainer(), _trainer(FlowTraining(batch_size=8, learning_rate=1e-2, warmup=3, precision="bf16"))
    for _ in range(4):
        difference = abs(exact.step().loss_bits_per_dim - coarse.step().loss_bits_per_dim)
    # bfloat16 has 8 bits: a relative error of 4e-3 in shifts and scales that add up to a few bits per dimension.
    assert difference < 0.1
    assert coarse.flow._levels()[0].network_dtype is None, "encoding would be imprecise, too"


def test_a_state_of_another_architecture_is_rejected():
    other = FlowTrainer(Flow(FlowConfig(height=6, width=4, channels=1, levels=1, steps=2, hidden=8)), TRAINING, IMAGES)
    with pytest.raises(FormatError, match="belongs to another configuration"):
        _trainer().load_state_dict(other.state_dict())
    state = other.state_dict()
    del state["counter.iteration"]
    with pytest.raises(FormatError, match="belongs to another configuration"):
        other.load_state_dict(state)


def test_training_without_images_is_rejected():
    with pytest.raises(RecipeError, match="the train split has no images"):
        FlowTrainer(Flow(CONFIG), TRAINING, IMAGES[:0])


def test_after_the_warm_up_the_learning_rate_is_constant_or_decays_to_zero():
    constant = FlowTraining(iterations=100, learning_rate=0.5, warmup=4)
    assert [learning_rate(constant, iteration) for iteration in (0, 1, 3, 99)] == [0.125, 0.25, 0.5, 0.5]
    cosine = msgspec.structs.replace(constant, schedule="cosine")
    rates = [learning_rate(cosine, iteration) for iteration in range(4, 101)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(cosine, 50) == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0.0)
