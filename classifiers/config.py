"""How a classifier is made and trained, as a recipe says it. Imports no torch, so that recipes are read at once."""

from typing import Annotated, Literal

import msgspec

from lsmix.classifiers.architectures import CNN13, check_architecture
from lsmix.classifiers.methods import PIXEL_METHODS
from lsmix.data.errors import RecipeError

__all__ = ["ClassifierTraining", "PixelMix"]

_Epochs = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_CNN13_WIDTH = 128  # [P Table 5]


class PixelMix(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the images of a batch are mixed with one another while a classifier is trained."""

    method: str  # a name in PIXEL_METHODS
    alpha: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = (
        1.0  # λ ~ Beta(α, α), the share of the second image; above 0
    )
    rate: Literal["per-sample", "per-batch"] = "per-sample"  # a λ for each image, or one for all of a batch

    def __post_init__(self) -> None:
        PIXEL_METHODS.check(self.method)


class ClassifierTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a classifier is made and trained; the defaults are those of CNN-13 on CIFAR-10 [P B.2, B.3]."""

    architecture: str = CNN13  # "cnn-13", "wrn-D-K", "timm:NAME" or "package.module:callable"
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)] = _CNN13_WIDTH  # of CNN-13: channels of the first block
    final_batch_norm: bool = False  # of CNN-13: batch norm on the logits; the paper has it for SVHN only
    epochs: _Epochs = 300  # passes over the source, at least 1
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 128  # images an update; the source is made with it
    optimiser: Literal["adam", "sgd"] = "adam"  # Adam has β 0.9 and 0.999
    momentum: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.9  # of SGD, in [0, 1)
    nesterov: bool = True  # of SGD: look ahead along the momentum, which must then be above 0
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] = 0.0  # factor of ½‖v‖² over all parameters
    grad_clip: Annotated[float, msgspec.Meta(ge=0.0, le=1e12)] = (
        0.0  # largest norm of the gradient of all parameters; 0 for none
    )
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=1000.0)] = 1e-3  # of the first update
    schedule: Literal["constant", "exponential", "cosine"] = "exponential"  # how the learning rate falls
    decay: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.97  # factor of one exponential decay, in (0, 1]
    decay_every_epochs: _Epochs = 2  # epochs from one decay to the next, at least 1
    decay_after_updates: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = (
        184_000  # updates before decay sets in; 60,000 for SVHN
    )
    translate: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2  # pixels that an image is moved by at most on either axis
    flip: bool = True  # mirror half of the images; False for SVHN
    normalise: Literal["none", "channel"] = "none"  # inputs in [0, 1], or brought to mean 0 and variance 1 by channel
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of convolutions and matrix products

    def __post_init__(self) -> None:
        check_architecture(self.architecture)
        if self.architecture != CNN13 and (self.width != _CNN13_WIDTH or self.final_batch_norm):
            raise RecipeError(
                f"width and final_batch_norm belong to {CNN13!r}; leave them out for {self.architecture!r}. "
                "A wide residual network has its depth and width in its name."
            )
        if self.optimiser == "sgd" and self.nesterov and not self.momentum:
            raise RecipeError(
                "optimiser 'sgd' with nesterov needs a momentum above 0. Set 'nesterov = false' or a momentum."
            )
