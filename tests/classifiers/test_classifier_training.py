"""A classifier learns, resumes exactly, and does not change the global random state."""

import msgspec
import numpy as np
import pytest
import torch
from emulated_graphs import emulate_cuda_graphs
from safetensors.torch import load, save
from torch import nn

from lsmix.classifiers.config import ClassifierTraining, PixelMix
from lsmix.classifiers.normalise import channel_statistics
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.errors import DivergedError, FormatError, RecipeError
from lsmix.data.loaders.batch import Batch, soft_target

SHAPE = (8, 8, 1)


class ListSource:
    """Batches of fixed images, in an order that depends on the epoch."""

    def __init__(self, images, labels, batch_size):
        self.images, self.labels, self.batch_size, self.epoch = images, labels, batch_size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.images))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            labels = torch.from_numpy(self.labels[rows])
            images = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2)
            yield Batch(images, labels, labels, torch.zeros(len(rows)))

    def state_dict(self):
        return {"epoch": self.epoch}


def stripes(count, seed=0):
    """Return noisy images of horizontal (0) or vertical (1) stripes: separable, but not by mean."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pattern = np.tile([40, 200], 4)
    images = np.where(labels[:, None, None] == 1, pattern[None, None, :], pattern[None, :, None])
    noisy = images[..., None] + rng.integers(-30, 31, (count, *SHAPE))
    return noisy.astype(np.uint8), labels.astype(np.int64)


def config(**fields):
    return ClassifierTraining(**({"width": 8, "epochs": 4, "batch_size": 16, "learning_rate": 3e-3} | fields))


SGD = {"optimiser": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4, "grad_clip": 5.0, "schedule": "cosine"}
WIDE = {**SGD, "architecture": "wrn-10-1", "width": 128, "normalise": "channel"}
MIXES = (PixelMix(method="mixup"), PixelMix(method="cutmix", rate="per-batch"))


def trainer(seed=0, *, mixes=None, **fields):
    statistics = channel_statistics(stripes(128)[0])
    return ClassifierTrainer(config(**fields), 2, SHAPE, seed=seed, statistics=statistics, mixes=mixes)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_it_learns_a_separable_problem_within_four_epochs():
    learner = trainer()
    source = ListSource(*stripes(128), batch_size=16)
    results = [learner.run_epoch(source) for _ in range(4)]
    assert (learner.epoch, learner.update) == (4, 32)
    assert {(fact.updates, fact.images) for fact in results} == {(8, 128)}
    assert results[-1].loss < results[0].loss
    # 32 updates: without bias-corrected running statistics the error would be near chance.
    assert learner.evaluate(*stripes(64, seed=9)) < 5.0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"final_batch_norm": True, "schedule": "cosine"},
        SGD,
        {**SGD, "momentum": 0.0, "nesterov": False},
        WIDE,
        {"mixes": lambda epoch, index: MIXES[: (epoch + index) % 3]},
    ],
)
def test_resumed_training_equals_uninterrupted_training(fields):
    source = ListSource(*stripes(40), batch_size=16)
    straight, first = trainer(**fields), trainer(**fields)
    losses = [straight.run_epoch(source).loss for _ in range(3)]
    first.run_epoch(source)
    resumed = trainer(seed=0, **fields)
    resumed.run_epoch(source)  # earlier epochs must not affect the restored state
    resumed.run_epoch(source)
    resumed.load_state_dict(load(save(first.state_dict())))
    assert resumed.epoch == 1
    assert [resumed.run_epoch(source).loss for _ in range(2)] == losses[1:]
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_state_from_before_the_first_update_can_be_restored():
    source = ListSource(*stripes(32), batch_size=16)
    fresh, used = trainer(), trainer()
    used.run_epoch(source)
    used.load_state_dict(fresh.state_dict())
    assert used.run_epoch(source) == fresh.run_epoch(source)


def test_the_seed_determines_the_run():
    source = ListSource(*stripes(32), batch_size=16)
    losses = [trainer(seed=seed).run_epoch(source).loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_global_random_state_has_no_effect_and_does_not_change():
    source = ListSource(*stripes(32), batch_size=16)
    losses = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        losses.append(trainer().run_epoch(source).loss)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[0] == losses[1]


def test_evaluation_has_no_side_effects_and_returns_percent():
    learner = trainer()
    learner.run_epoch(ListSource(*stripes(32), batch_size=16))
    before = learner.state_dict()
    images, labels = stripes(300)
    images.flags.writeable = False  # like memory-mapped data sets
    error = learner.evaluate(images, labels)
    assert error + learner.evaluate(images, 1 - labels) == pytest.approx(100.0)
    assert same(before, learner.state_dict())


def test_batches_with_two_labels_are_weighted_by_share():
    class Swapped(ListSource):
        def __iter__(self):
            for images, label, _, _ in super().__iter__():
                yield Batch(images, 1 - label, label, torch.ones(len(label)))  # share 1 of the second label

    learner = trainer()
    for _ in range(4):
        learner.run_epoch(Swapped(*stripes(128), batch_size=16))
    assert learner.evaluate(*stripes(64, seed=9)) < 5.0


def test_soft_targets_equal_their_two_labels():
    class Soft(ListSource):
        def __iter__(self):
            for images, label, _, share in super().__iter__():
                yield images, soft_target(label, 1 - label, share + 0.25, 2)

    class Pairs(ListSource):
        def __iter__(self):
            for images, label, _, share in super().__iter__():
                yield Batch(images, label, 1 - label, share + 0.25)

    learners = trainer(), trainer()
    results = [
        learner.run_epoch(kind(*stripes(40), batch_size=16))
        for learner, kind in zip(learners, (Soft, Pairs), strict=True)
    ]
    assert results[0] == results[1]
    assert same(learners[0].state_dict(), learners[1].state_dict())


def test_targets_of_wrong_shape_are_rejected():
    class Kornia(ListSource):
        def __iter__(self):
            for images, label, _, share in super().__iter__():
                yield images, torch.stack([label.float(), label.float(), share], dim=1)

    with pytest.raises(RecipeError, match=r"batch 0 of epoch 0 has targets \(16, 3\): expected .*\(16, 2\)"):
        trainer().run_epoch(Kornia(*stripes(32), batch_size=16))


def test_mixes_is_called_with_epoch_and_index_of_each_batch():
    calls = []
    learner = trainer(mixes=lambda epoch, index: calls.append((epoch, index)) or ())
    source = ListSource(*stripes(40), batch_size=16)
    plain = trainer()
    for _ in range(2):
        assert learner.run_epoch(source) == plain.run_epoch(source)
    assert calls == [(epoch, index) for epoch in range(2) for index in range(3)]


def test_batches_are_mixed_after_augmentation(monkeypatch):
    seen = []

    def spy(mix, images, target, seed, *words):
        seen.append((mix.method, seed, words, bool((images == 7).all()), target.clone()))
        return images, 1 - target

    monkeypatch.setattr("lsmix.classifiers.training.augment", lambda images, **_: torch.full_like(images, 7))
    monkeypatch.setattr("lsmix.classifiers.training.mix_batch", spy)
    learner = trainer(seed=5, mixes=lambda _epoch, _index: MIXES)
    learner.run_epoch(ListSource(*stripes(8), batch_size=8))
    assert [entry[:4] for entry in seen] == [
        ("mixup", 5, ("classifier", "mix", 0, 0, 0), True),
        ("cutmix", 5, ("classifier", "mix", 0, 0, 1), True),
    ]
    assert torch.equal(seen[1][4], 1 - seen[0][4])  # the second mix receives the result of the first


def test_a_mixed_run_learns_and_differs_from_a_plain_run():
    learner, plain = trainer(mixes=lambda _epoch, _index: (PixelMix(method="cutmix"),)), trainer()
    source = ListSource(*stripes(128), batch_size=16)
    losses = [(learner.run_epoch(source).loss, plain.run_epoch(source).loss) for _ in range(6)]
    assert losses[0][0] != losses[0][1]
    assert learner.evaluate(*stripes(64, seed=9)) < 10.0


def test_sgd_matches_a_manual_nesterov_step_with_weight_decay_and_clipping():
    fields = {**SGD, "schedule": "constant", "weight_decay": 0.1, "grad_clip": 0.5, "translate": 0, "flip": False}
    learner = trainer(**fields)
    gradients = []
    step = learner.optimiser.step
    learner.optimiser.step = lambda: (gradients.append([p.grad.clone() for p in learner.model.parameters()]), step())
    buffers = [torch.zeros_like(p) for p in learner.model.parameters()]
    for _ in range(3):
        before = [p.detach().clone() for p in learner.model.parameters()]
        learner.run_epoch(ListSource(*stripes(16), batch_size=16))
        norm = torch.stack([g.norm() for g in gradients[-1]]).norm()
        assert float(norm) <= 0.5 + 1e-5
        for old, new, gradient, buffer in zip(before, learner.model.parameters(), gradients[-1], buffers, strict=True):
            decayed = gradient + 0.1 * old
            buffer.mul_(0.9).add_(decayed)
            torch.testing.assert_close(new.detach(), old - 0.05 * (decayed + 0.9 * buffer))


def test_normalised_inputs_need_statistics():
    with pytest.raises(RecipeError, match="normalise 'channel' needs the training set's statistics"):
        ClassifierTrainer(config(normalise="channel"), 2, SHAPE, seed=0)
    assert torch.equal(
        trainer(normalise="channel").model.mean, torch.from_numpy(channel_statistics(stripes(128)[0])[0]).float()
    )


def test_a_loss_that_is_not_finite_stops_training():
    learner = trainer()
    with torch.no_grad():
        learner.model.head.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"no longer finite in epoch 0 after 2 updates"):
        learner.run_epoch(ListSource(*stripes(32), batch_size=16))


def test_a_state_of_another_configuration_is_rejected_without_changes():
    learner = trainer()
    before = learner.state_dict()
    with pytest.raises(FormatError, match=r"expected torch.float32 \(8, 1, 3, 3\), got torch.float32 \(4, 1, 3, 3\)"):
        learner.load_state_dict(trainer(width=4).state_dict())
    with pytest.raises(FormatError, match=r"lacks tensor 'counter\.update'"):
        learner.load_state_dict({name: tensor for name, tensor in before.items() if name != "counter.update"})
    with pytest.raises(FormatError, match=r"unknown tensor 'model\.head_norm\.bias'"):
        learner.load_state_dict(trainer(final_batch_norm=True).state_dict())
    assert same(before, learner.state_dict())


def test_a_state_of_another_optimiser_is_rejected():
    source = ListSource(*stripes(32), batch_size=16)
    adam, sgd = trainer(), trainer(optimiser="sgd")
    for learner in (adam, sgd):
        learner.run_epoch(source)
    with pytest.raises(
        FormatError, match=r"unknown tensor 'sgd\..*momentum_buffer': it belongs to another configuration"
    ):
        adam.load_state_dict(sgd.state_dict())
    with pytest.raises(FormatError, match=r"unknown tensor 'adam\."):
        sgd.load_state_dict(adam.state_dict())


def test_training_with_an_unused_parameter_can_be_resumed():
    source = ListSource(*stripes(32), batch_size=16)
    learner, other = trainer(), trainer()
    for one in (learner, other):
        one.model.head.bias.requires_grad_(False)
        one.run_epoch(source)
    other.run_epoch(source)
    other.load_state_dict(learner.state_dict())
    assert same(other.state_dict(), learner.state_dict())
    broken = {name: tensor for name, tensor in learner.state_dict().items() if name != "adam.head.weight.exp_avg"}
    with pytest.raises(FormatError, match=r"lacks tensor 'adam\.head\.weight\.exp_avg'"):
        other.load_state_dict(broken)


def test_a_remainder_of_one_image_is_rejected_only_with_final_batch_norm():
    source = ListSource(*stripes(17), batch_size=16)
    assert trainer().run_epoch(source).updates == 2
    with pytest.raises(RecipeError, match="batch 1 of epoch 0 has a single image"):
        trainer(final_batch_norm=True).run_epoch(source)


def test_training_or_evaluating_without_images_is_an_error():
    with pytest.raises(RecipeError, match="epoch 0 has no batches"):
        trainer().run_epoch(ListSource(*stripes(0), batch_size=16))
    with pytest.raises(RecipeError, match="got 0 images and 0 labels"):
        trainer().evaluate(np.zeros((0, *SHAPE), np.uint8), np.zeros(0, np.int64))


def test_an_invalid_configuration_is_rejected():
    decode = msgspec.json.Decoder(ClassifierTraining).decode
    assert decode("{}") == ClassifierTraining()
    for wrong in ('{"width": 0}', '{"decay": 1.5}', '{"architecture": "vgg"}', '{"wdith": 8}', '{"learning_rate": 0}'):
        with pytest.raises(msgspec.ValidationError):
            decode(wrong)
    for wrong in (
        '{"momentum": 1}',
        '{"grad_clip": -1}',
        '{"weight_decay": -1}',
        '{"optimiser": "sgd", "momentum": 0}',
    ):
        with pytest.raises(msgspec.ValidationError):
            decode(wrong)


RECORDED = pytest.mark.parametrize(
    "fields", [{}, {"precision": "bf16"}, WIDE], ids=["with dropout", "in bfloat16", "wide"]
)


@RECORDED
def test_recorded_training_equals_plain_training_and_skips_a_smaller_last_batch(fields):
    images, labels = stripes(40)  # two batches of 16 and one of 8

    def trained():
        learner = trainer(**fields)
        results = [learner.run_epoch(ListSource(images, labels, 16)) for _ in range(3)]
        return results, learner.state_dict()

    expected_results, expected = trained()
    with emulate_cuda_graphs() as recorder:
        results, state = trained()
    assert (recorder.captures, recorder.replays) == (1, 2 * 3)
    assert results == expected_results
    assert same(state, expected)


def test_a_network_of_another_package_is_not_recorded(monkeypatch):
    # It may draw random numbers on the host.
    monkeypatch.setattr("lsmix.classifiers.registry._network", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    with emulate_cuda_graphs() as recorder:
        trainer(architecture="torch.nn:Linear", width=128).run_epoch(ListSource(*stripes(32), 16))
    assert recorder.captures == 0


@pytest.mark.gpu
def test_gpu_runs_are_reproducible():
    source = ListSource(*stripes(64), batch_size=16)
    results = []
    for _ in range(2):
        learner = ClassifierTrainer(config(), 2, SHAPE, seed=0, device="cuda")
        results.append([learner.run_epoch(source) for _ in range(2)])
    assert results[0] == results[1]
