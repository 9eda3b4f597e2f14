"""Training of a classifier: epochs over a source of batches, error rates, and a state to resume from.

An epoch depends only on the state at its start, on (seed, epoch) and on the source's batches, so resumed and
uninterrupted training produce the same weights.

Axes: B images, C channels, H rows, W columns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lsmix.classifiers.config import ClassifierTraining, PixelMix
from lsmix.classifiers.evaluation import logits_of, passes, seeded
from lsmix.classifiers.normalise import ChannelStatistics, Normalised
from lsmix.classifiers.pixel_mixing import mix_batch
from lsmix.classifiers.registry import build_classifier, is_own
from lsmix.data.errors import DivergedError, RecipeError
from lsmix.data.loaders.arithmetic import arithmetic
from lsmix.data.loaders.batch import Batch, SoftBatch, soft_target, to_device
from lsmix.data.loaders.cuda_graph import Replayed
from lsmix.data.loaders.epoch_loader import EpochLoader
from lsmix.data.loaders.ranks import ALONE, Ranks
from lsmix.data.loaders.training_state import flat_state, restore_state
from lsmix.data.rng import generator

__all__ = ["ClassifierTrainer", "EpochResult", "Mixes", "augment", "learning_rate"]

# Maps (epoch, index of the batch in the epoch), both from 0, to the mixing steps of the batch, in order.
Mixes: TypeAlias = Callable[[int, int], Sequence[PixelMix]]
_UPDATES_PER_CHECK = 64  # updates between checks for a finite loss, each of which synchronises with the GPU


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """The results of one epoch of training."""

    loss: float  # nats per image, mean over the epoch, with dropout and augmentation
    updates: int  # in this epoch
    images: int  # in this epoch


class ClassifierTrainer:
    """Train a classifier: call ``run_epoch`` for each epoch, and ``evaluate`` at any time.

    ``image_shape`` is (H, W, C). The weights are drawn from ``seed``; the global random state does not change.
    ``normalise = "channel"`` needs ``statistics``, the result of ``channel_statistics`` for the training set; restoring
    a state replaces them. ``mixes`` defines how each batch is mixed in pixel space after augmentation; default: no
    mixing.

    With several ``ranks``, every rank prepares the same batch and trains on its part of it. Batch norm and dropout work
    on that part, and running statistics are averaged over ranks after each epoch.

    Raises:
        RecipeError: The architecture does not support this image shape, or required statistics are missing.

    Example:
        >>> import numpy as np
        >>> config = ClassifierTraining(width=4, flip=False, epochs=1)
        >>> trainer = ClassifierTrainer(config, classes=10, image_shape=(8, 8, 1), seed=0)
        >>> 0.0 <= trainer.evaluate(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 2])) <= 100.0
        True
    """

    def __init__(
        self,
        config: ClassifierTraining,
        classes: int,
        image_shape: tuple[int, int, int],
        seed: int,
        device: str | torch.device = "cpu",
        *,
        statistics: ChannelStatistics | None = None,
        mixes: Mixes | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.classes = classes
        self.image_shape = image_shape
        self.seed = seed
        self.device = torch.device(device)
        self.epoch = 0  # completed epochs, also the index of the next epoch
        self.update = 0  # completed updates
        self._ranks = ranks
        self._mixes: Mixes = mixes or (lambda _epoch, _index: ())
        with seeded(self.device, seed, "initialise"):
            model = build_classifier(config, classes, image_shape)
        if isinstance(model, Normalised):
            if statistics is None:
                raise RecipeError(
                    "normalise 'channel' needs the training set's statistics. Pass statistics=channel_statistics(images)."
                )
            model.set_statistics(statistics)
        # On the CPU, channels-last takes 0.85× the time for training and 0.8× for evaluation; it also suits tensor cores.
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it for modules
        self.optimiser = _optimiser(config, self.model)
        # External networks may branch on the host; a recorded graph would repeat the same branch in every update.
        self._recorded_images = self._ranks.part(config.batch_size) if is_own(config.architecture) else None
        self._gradients = Replayed(
            partial(_loss_and_gradients, self.model, config.precision), partial(_state, self.model)
        )

    def run_epoch(self, source: EpochLoader[Batch | SoftBatch]) -> EpochResult:
        """Train on every batch of epoch ``self.epoch`` of the source; return the results.

        Raises:
            DivergedError: The loss is no longer finite. Restore the trainer from an earlier state.
            RecipeError: A batch is invalid, or the source is empty.
        """
        source.set_epoch(self.epoch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        images = updates = 0
        self.model.train()
        rank = () if self._ranks.first else (self._ranks.rank,)
        with seeded(self.device, self.seed, "dropout", self.epoch, *rank), arithmetic(self.config.precision):
            for updates, batch in enumerate(source, start=1):
                self._set_rate(learning_rate(self.config, self.update, len(source)))
                loss_sum += self._train_batch(batch, updates - 1) * len(batch[0])
                images += len(batch[0])
                self.update += 1
                if updates % _UPDATES_PER_CHECK == 0:
                    self._check_finite(loss_sum)
        if images == 0:
            raise RecipeError(f"epoch {self.epoch} has no batches. Use more images or a smaller batch_size.")
        self._check_finite(loss_sum)
        self._ranks.average([buffer for buffer in self.model.buffers() if buffer.is_floating_point()])
        self.epoch += 1
        return EpochResult(loss=float(loss_sum) / images, updates=updates, images=images)

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the error rate in % on images, uint8 (N, H, W, C), with integer labels (N,).

        Raises:
            RecipeError: There are no images, or the numbers of images and labels differ.
        """
        if len(images) == 0 or len(images) != len(labels):
            raise RecipeError(
                f"an error rate needs one label per image; got {len(images)} images and {len(labels)} labels."
            )
        return 100.0 * int(np.count_nonzero(self.predict(images) != labels)) / len(images)

    def predict(self, images: np.ndarray) -> NDArray[np.int64]:
        """Return the most likely class, int64 (N,), of each image, uint8 (N, H, W, C); N is at least 1."""
        batches = passes(self.model, images, device=self.device, precision=self.config.precision)
        return torch.cat([logits.argmax(dim=1) for _, logits in batches]).cpu().numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything needed to resume, as contiguous tensors with separate memory (for safetensors)."""
        return flat_state(self.model, self.optimiser, {"epoch": self.epoch, "update": self.update})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state that ``state_dict`` of a trainer with the same configuration returned.

        Raises:
            FormatError: A tensor is missing, unknown, or has another shape or type. The trainer remains unchanged.
        """
        counters = restore_state(self.model, self.optimiser, ("epoch", "update"), state)
        self.epoch, self.update = counters["epoch"], counters["update"]

    def _train_batch(self, batch: Batch | SoftBatch, index: int) -> Tensor:
        """Run one update on batch ``index`` of the epoch; return its mean loss."""
        images, target = self._prepare(batch, index)
        part = self._ranks.part(len(images))
        share = len(images[part]) * self._ranks.size / len(images)  # 1, except if the last batch is split unevenly
        images, target = images[part], target[part]
        if len(images) == 1 and self.config.final_batch_norm:
            raise RecipeError(
                f"batch {index} of epoch {self.epoch} has a single image, which final_batch_norm does not support. "
                "Choose a batch_size that does not leave a remainder of 1 image."
            )
        if share == 1 and part == self._recorded_images:
            loss, *gradients = self._gradients(images, target)
            weights = [weight for weight in self.model.parameters() if weight.grad is not None]  # set by the recording
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
        else:
            loss = _backward(self.model, self.config.precision, images, target, share)
        self._ranks.average([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimiser.step()
        return loss

    def _prepare(self, batch: Batch | SoftBatch, index: int) -> tuple[Tensor, Tensor]:
        """Return augmented and mixed images, uint8 (B, C, H, W), and targets, float32 (B, classes), on the device."""
        images, *rest = (to_device(part, self.device) for part in batch)
        target = soft_target(rest[0], rest[1], rest[2], self.classes) if isinstance(batch, Batch) else rest[0]
        if target.shape != (len(images), self.classes):
            raise RecipeError(
                f"batch {index} of epoch {self.epoch} has targets {tuple(target.shape)}: expected a Batch, or images and "
                f"targets ({len(images)}, {self.classes}). Create the source with labels 'pair' or 'soft'."
            )
        images = augment(
            images,
            translate=self.config.translate,
            flip=self.config.flip,
            generator=generator(self.seed, "classifier", "augment", self.epoch, index),
        )
        for position, mix in enumerate(self._mixes(self.epoch, index)):
            words = ("classifier", "mix", self.epoch, index, position)
            images, target = mix_batch(mix, images, target, self.seed, *words)
        return images, target

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate

    def _check_finite(self, loss_sum: Tensor) -> None:
        self._ranks.average([loss_sum])  # so that all ranks decide alike
        if not math.isfinite(float(loss_sum)):
            raise DivergedError(
                f"the classifier's loss is no longer finite in epoch {self.epoch} after {self.update} updates. "
                f"Use a learning_rate below {self.config.learning_rate:g}, or precision 'float32'."
            )


def augment(images: Tensor, *, translate: int, flip: bool, generator: np.random.Generator) -> Tensor:
    """Shift each image by −translate to translate pixels along both axes, and mirror it with probability ½.

    ``images`` is (B, C, H, W) of any dtype and is not modified; pixels shifted in are 0. The result has the same shape,
    dtype and device, in channels-last memory, with the same values on every device.

    Example:
        >>> import numpy as np, torch
        >>> from lsmix.classifiers.training import augment
        >>> moved = augment(torch.ones(4, 3, 8, 8), translate=2, flip=True, generator=np.random.default_rng(0))
        >>> moved.shape, bool((moved <= 1).all())
        (torch.Size([4, 3, 8, 8]), True)
    """
    count, _, height, width = images.shape
    # All three are always drawn, so that enabling flips does not change the shifts.
    down = generator.integers(-translate, translate, size=count, endpoint=True)
    right = generator.integers(-translate, translate, size=count, endpoint=True)
    mirrored = generator.integers(0, 1, size=count, endpoint=True).astype(bool) & flip
    if translate == 0 and not flip:
        return images.contiguous(memory_format=torch.channels_last)
    columns = np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width)) - right[:, None] + translate
    rows = np.arange(height) - down[:, None] + translate

    images_BHWC = images.permute(0, 2, 3, 1)
    padded_BHWC = functional.pad(images_BHWC, (0, 0, translate, translate, translate, translate))
    rows_BH = to_device(torch.from_numpy(rows), images.device)
    columns_BW = to_device(torch.from_numpy(columns), images.device)
    index_B = torch.arange(count, device=images.device)
    return padded_BHWC[index_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def _backward(model: nn.Module, precision: str, images: Tensor, target: Tensor, share: float = 1.0) -> Tensor:
    """Compute the gradients of a batch's mean loss times ``share``; return this loss."""
    loss = functional.cross_entropy(logits_of(model, images, precision), target)
    if share != 1:
        loss = loss * share
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss.detach()


def _loss_and_gradients(model: nn.Module, precision: str, images: Tensor, target: Tensor) -> list[Tensor]:
    loss = _backward(model, precision, images, target)
    return [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _optimiser(config: ClassifierTraining, model: nn.Module) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.999), weight_decay=decay)
    return torch.optim.SGD(
        model.parameters(), rate, momentum=config.momentum, nesterov=config.nesterov, weight_decay=decay
    )


def learning_rate(config: ClassifierTraining, update: int, updates_per_epoch: int) -> float:
    """Return the learning rate of an update, counted from 0.

    "exponential" multiplies by ``decay`` every ``decay_every_epochs`` epochs after the first ``decay_after_updates``
    updates, as literally stated in [P B.3]. For CIFAR-10, the stated 184,000 updates are never reached in 300 epochs of
    391 updates (117,300), so the rate stays constant. "cosine" decays to 0 over all epochs as half a cosine wave.

    Example:
        >>> config = ClassifierTraining(learning_rate=1.0, decay=0.5, decay_every_epochs=2, decay_after_updates=100)
        >>> [learning_rate(config, update, updates_per_epoch=10) for update in (0, 100, 119, 120, 140)]
        [1.0, 1.0, 1.0, 0.5, 0.25]
    """
    start, epoch = config.learning_rate, max(1, updates_per_epoch)
    if config.schedule == "cosine":
        total = config.epochs * epoch
        return 0.5 * start * (1.0 + math.cos(math.pi * min(update, total) / total))
    if config.schedule == "exponential":
        start *= config.decay ** (max(0, update - config.decay_after_updates) // (config.decay_every_epochs * epoch))
    return start
