"""The training loop of a classifier: an epoch over a source of batches, an error rate, and a state to resume from.

The one rule: an epoch depends on the state at its start, on (seed, epoch) and on the source's batches alone, so a run that
resumes at the end of an epoch goes on exactly as one that was never stopped.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lsmix.classifiers.augment import augment
from lsmix.classifiers.cnn13 import Cnn13
from lsmix.classifiers.config import ClassifierTraining
from lsmix.classifiers.loss import pair_loss
from lsmix.classifiers.schedule import Schedule, constant, cosine, exponential
from lsmix.classifiers.state import flat_state, restore_state
from lsmix.data.batch import Batch, BatchSource
from lsmix.data.errors import DivergedError, RecipeError
from lsmix.data.seeds import generator, torch_seed

__all__ = ["ARCHITECTURES", "ClassifierTrainer", "EpochFacts"]

_EVALUATION_BATCH = 256  # images; fixed, since other batch sizes give other last bits
_UPDATES_PER_CHECK = 64  # asking a GPU whether the loss is finite makes it wait, so it is asked this seldom


@dataclass(frozen=True, kw_only=True)
class EpochFacts:
    """What one epoch of training came to."""

    epoch: int  # counted from 0
    loss: float  # nats an image, mean over the epoch, with dropout and augmentation
    updates: int  # in this epoch
    images: int  # in this epoch
    learning_rate: float  # of the last update


class ClassifierTrainer:
    """A classifier in training: ``run_epoch`` once an epoch, ``evaluate`` at will.

    ``image_shape`` is (H, W, C). The weights are drawn from ``seed``; the global random state is left as it was.

    Raises:
        RecipeError: the architecture cannot take images of this shape.

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
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = torch.device(device)
        self.epoch = 0  # epochs done, which is also the next one's number
        self.update = 0  # updates done
        with _seeded(self.device, seed, "initialise"):
            model = ARCHITECTURES[config.architecture](config, classes, image_shape)
        # Channels-last takes 0.85 of the time of a training step on the CPU, 0.8 of an evaluation, and suits tensor cores.
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it for modules
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.999))

    def run_epoch(self, source: BatchSource) -> EpochFacts:
        """Train on every batch of the source's epoch ``self.epoch``, and return what it came to.

        Raises:
            DivergedError: the loss is no longer finite; the trainer must then be restored from an earlier state.
            RecipeError: a batch cannot be trained on, or the source is empty.
        """
        source.set_epoch(self.epoch)
        rate = self._schedule(len(source))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        images = updates = 0
        self.model.train()
        with _seeded(self.device, self.seed, "dropout", self.epoch), _arithmetic(self.config.precision):
            for updates, batch in enumerate(source, start=1):
                self._set_rate(rate(self.update))
                loss_sum += self._train_batch(batch, updates - 1) * len(batch.images)
                images += len(batch.images)
                self.update += 1
                if updates % _UPDATES_PER_CHECK == 0:
                    self._check_finite(loss_sum)
        if images == 0:
            raise RecipeError(f"epoch {self.epoch} has no batch to train on. Use more images or a smaller batch_size.")
        self._check_finite(loss_sum)
        facts = EpochFacts(
            epoch=self.epoch,
            loss=float(loss_sum) / images,
            updates=updates,
            images=images,
            learning_rate=rate(self.update - 1),
        )
        self.epoch += 1
        return facts

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the error rate in % on images, uint8 (N, H, W, C), with labels, integer (N,).

        Raises:
            RecipeError: there are no images, or not as many labels.
        """
        if len(images) == 0 or len(images) != len(labels):
            raise RecipeError(
                f"an error rate needs images and as many labels; got {len(images)} images, {len(labels)} labels."
            )
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        self.model.eval()
        with torch.inference_mode(), _arithmetic(self.config.precision):
            for start in range(0, len(images), _EVALUATION_BATCH):
                rows = slice(start, start + _EVALUATION_BATCH)
                # Copied, because a slice of a data set is a read-only map of its file, which torch does not take.
                pixels = torch.from_numpy(np.array(images[rows], order="C")).permute(0, 3, 1, 2)
                truth = torch.from_numpy(np.array(labels[rows], dtype=np.int64)).to(self.device)
                wrong += (self._logits(pixels.to(self.device)).argmax(dim=1) != truth).sum()
        return 100.0 * int(wrong) / len(images)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that resuming needs as contiguous tensors that share no memory, as safetensors wants them."""
        return flat_state(self.model, self.optimiser, {"epoch": self.epoch, "update": self.update})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state from ``state_dict`` of a trainer with the same configuration.

        Raises:
            FormatError: a tensor is missing, unknown, or of another shape or type; nothing is changed then.
        """
        counters = restore_state(self.model, self.optimiser, ("epoch", "update"), state)
        self.epoch, self.update = counters["epoch"], counters["update"]

    def _train_batch(self, batch: Batch, index: int) -> Tensor:
        """Do one update on the epoch's batch ``index``; return its mean loss."""
        if len(batch.images) == 1 and self.config.final_batch_norm:
            raise RecipeError(
                f"batch {index} of epoch {self.epoch} has a single image, which final_batch_norm cannot take. "
                "Choose a batch_size that does not leave 1 image over."
            )
        draws = generator(self.seed, "classifier", "augment", self.epoch, index)
        images = augment(
            batch.images.to(self.device, non_blocking=True),
            translate=self.config.translate,
            flip=self.config.flip,
            generator=draws,
        )
        label_a, label_b, share_b = (part.to(self.device, non_blocking=True) for part in batch[1:])
        loss = pair_loss(self._logits(images), label_a, label_b, share_b)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        self.optimiser.step()
        return loss.detach()

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits float32 (B, classes) of images uint8 (B, C, H, W), scaled to [0, 1] on the device."""
        pixels = images.float().div_(255.0).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits: Tensor = self.model(pixels)
        return logits.float()

    def _schedule(self, updates_per_epoch: int) -> Schedule:
        config = self.config
        if config.schedule == "constant":
            return constant(config.learning_rate)
        if config.schedule == "cosine":
            return cosine(config.learning_rate, total_updates=max(1, config.epochs * updates_per_epoch))
        return exponential(
            config.learning_rate,
            factor=config.decay,
            every_epochs=config.decay_every_epochs,
            after_updates=config.decay_after_updates,
            updates_per_epoch=max(1, updates_per_epoch),
        )

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate

    def _check_finite(self, loss_sum: Tensor) -> None:
        if not math.isfinite(float(loss_sum)):
            raise DivergedError(
                f"the classifier's loss is no longer finite in epoch {self.epoch}, by update {self.update}. "
                f"Use a learning_rate below {self.config.learning_rate:g}, or precision 'float32'."
            )


def _cnn13(config: ClassifierTraining, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    height, width, channels = image_shape
    return Cnn13(classes, channels, (height, width), config.width, config.final_batch_norm)


ARCHITECTURES: dict[str, Callable[[ClassifierTraining, int, tuple[int, int, int]], nn.Module]] = {"cnn-13": _cnn13}


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int, *words: str | int) -> Iterator[None]:
    """Seed torch's global generators, which modules draw from, inside the block only."""
    number = torch_seed(seed, "classifier", *words)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def _arithmetic(precision: str) -> contextlib.AbstractContextManager[None]:
    """Make cuDNN repeatable, and allow TF32 for "tf32" only, inside the block."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=precision == "tf32")
