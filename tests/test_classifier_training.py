"""A classifier learns, resumes exactly, and leaves the world's random state alone."""

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.training import ClassifierTrainer
from lsmix.data.batch import Batch
from lsmix.data.errors import DivergedError, FormatError, RecipeError

SHAPE = (8, 8, 1)


class ListSource:
    """Batches of fixed images in an order that depends on the epoch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int) -> None:
        self.images, self.labels, self.batch_size, self.epoch = images, labels, batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.images))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            labels = torch.from_numpy(self.labels[rows])
            images = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2)
            yield Batch(images, labels, labels, torch.zeros(len(rows)))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}


def stripes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images of horizontal (0) or vertical (1) stripes: separable, but not by their mean."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    pattern = np.tile([40, 200], 4)
    images = np.where(labels[:, None, None] == 1, pattern[None, None, :], pattern[None, :, None])
    noisy = images[..., None] + rng.integers(-30, 31, (count, *SHAPE))
    return noisy.astype(np.uint8), labels.astype(np.int64)


def config(**fields: object) -> ClassifierTraining:
    return ClassifierTraining(**({"width": 8, "epochs": 4, "batch_size": 16, "learning_rate": 3e-3} | fields))


def trainer(seed: int = 0, **fields: object) -> ClassifierTrainer:
    return ClassifierTrainer(config(**fields), classes=2, image_shape=SHAPE, seed=seed)


def same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_it_learns_a_separable_problem_within_four_epochs():
    learner = trainer()
    source = ListSource(*stripes(128), batch_size=16)
    facts = [learner.run_epoch(source) for _ in range(4)]
    assert [fact.epoch for fact in facts] == [0, 1, 2, 3]
    assert {(fact.updates, fact.images) for fact in facts} == {(8, 128)}
    assert facts[-1].loss < facts[0].loss
    # 32 updates: without the corrected running statistics this would be near chance.
    assert learner.evaluate(*stripes(64, seed=9)) < 5.0


@pytest.mark.parametrize("fields", [{}, {"final_batch_norm": True, "schedule": "cosine"}])
def test_resuming_from_safetensors_bytes_equals_never_stopping(fields):
    source = ListSource(*stripes(40), batch_size=16)
    straight, first = trainer(**fields), trainer(**fields)
    losses = [straight.run_epoch(source).loss for _ in range(3)]
    first.run_epoch(source)
    resumed = trainer(seed=0, **fields)
    resumed.run_epoch(source)  # its own history must not shine through
    resumed.run_epoch(source)
    resumed.load_state_dict(load(save(first.state_dict())))
    assert resumed.epoch == 1
    assert [resumed.run_epoch(source).loss for _ in range(2)] == losses[1:]
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_state_from_before_the_first_update_resumes_too():
    source = ListSource(*stripes(32), batch_size=16)
    fresh, used = trainer(), trainer()
    used.run_epoch(source)
    used.load_state_dict(fresh.state_dict())
    assert used.run_epoch(source) == fresh.run_epoch(source)


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    source = ListSource(*stripes(32), batch_size=16)
    losses = [trainer(seed=seed).run_epoch(source).loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_global_random_state_neither_matters_nor_moves():
    source = ListSource(*stripes(32), batch_size=16)
    losses = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        losses.append(trainer().run_epoch(source).loss)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert losses[0] == losses[1]


def test_evaluation_changes_nothing_and_counts_errors_in_percent():
    learner = trainer()
    learner.run_epoch(ListSource(*stripes(32), batch_size=16))
    before = learner.state_dict()
    images, labels = stripes(300)
    images.flags.writeable = False  # as mapped data sets are
    error = learner.evaluate(images, labels)
    assert error + learner.evaluate(images, 1 - labels) == pytest.approx(100.0)
    assert same(before, learner.state_dict())


def test_two_label_batches_are_learnt_from_by_their_shares():
    class Swapped(ListSource):
        def __iter__(self):
            for images, label, _, _ in super().__iter__():
                yield Batch(images, 1 - label, label, torch.ones(len(label)))  # all of the second label

    learner = trainer()
    for _ in range(4):
        learner.run_epoch(Swapped(*stripes(128), batch_size=16))
    assert learner.evaluate(*stripes(64, seed=9)) < 5.0


def test_a_loss_that_is_not_finite_stops_the_run():
    learner = trainer()
    with torch.no_grad():
        learner.model.head.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"no longer finite in epoch 0, by update 2"):
        learner.run_epoch(ListSource(*stripes(32), batch_size=16))


def test_a_state_of_another_configuration_is_refused_and_changes_nothing():
    learner = trainer()
    before = learner.state_dict()
    with pytest.raises(FormatError, match=r"expected torch.float32 \(8, 1, 3, 3\), got torch.float32 \(4, 1, 3, 3\)"):
        learner.load_state_dict(trainer(width=4).state_dict())
    with pytest.raises(FormatError, match=r"lacks tensor 'counter\.update'"):
        learner.load_state_dict({name: tensor for name, tensor in before.items() if name != "counter.update"})
    with pytest.raises(FormatError, match=r"unknown tensor 'model\.head_norm\.bias'"):
        learner.load_state_dict(trainer(final_batch_norm=True).state_dict())
    assert same(before, learner.state_dict())


def test_a_single_left_over_image_is_refused_only_where_it_cannot_be_normalised():
    source = ListSource(*stripes(17), batch_size=16)
    assert trainer().run_epoch(source).updates == 2
    with pytest.raises(RecipeError, match="batch 1 of epoch 0 has a single image"):
        trainer(final_batch_norm=True).run_epoch(source)


def test_nothing_to_train_or_evaluate_on_is_an_error():
    with pytest.raises(RecipeError, match="epoch 0 has no batch"):
        trainer().run_epoch(ListSource(*stripes(0), batch_size=16))
    with pytest.raises(RecipeError, match="got 0 images, 0 labels"):
        trainer().evaluate(np.zeros((0, *SHAPE), np.uint8), np.zeros(0, np.int64))


def test_a_configuration_refuses_what_makes_no_sense():
    decode = msgspec.json.Decoder(ClassifierTraining).decode
    assert decode("{}") == ClassifierTraining()
    for wrong in ('{"width": 0}', '{"decay": 1.5}', '{"architecture": "vgg"}', '{"wdith": 8}', '{"learning_rate": 0}'):
        with pytest.raises(msgspec.ValidationError):
            decode(wrong)


@pytest.mark.gpu
def test_a_gpu_run_repeats_itself_exactly():
    source = ListSource(*stripes(64), batch_size=16)
    facts = []
    for _ in range(2):
        learner = ClassifierTrainer(config(), 2, SHAPE, seed=0, device="cuda")
        facts.append([learner.run_epoch(source) for _ in range(2)])
    assert facts[0] == facts[1]
