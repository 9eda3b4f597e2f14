"""How a classifier is made and trained, as a recipe says it. Imports no torch, so that recipes are read at once."""

from typing import Annotated, Literal

import msgspec

__all__ = ["ClassifierTraining"]

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Rate = Annotated[float, msgspec.Meta(gt=0.0)]


class ClassifierTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a classifier is made and trained; the defaults are those of CNN-13 on CIFAR-10 [P B.2, B.3]."""

    architecture: Literal["cnn-13"] = "cnn-13"  # a name in ARCHITECTURES
    width: _Positive = 128  # channels of the first block, at least 1
    final_batch_norm: bool = False  # batch norm on the logits; the paper has it for SVHN only
    epochs: _Positive = 300  # passes over the source, at least 1
    batch_size: _Positive = 128  # images an update; the source is made with it
    optimiser: Literal["adam"] = "adam"  # with β 0.9 and 0.999
    learning_rate: _Rate = 1e-3  # of the first update, above 0
    schedule: Literal["constant", "exponential", "cosine"] = "exponential"  # how the learning rate falls
    decay: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.97  # factor of one exponential decay, in (0, 1]
    decay_every_epochs: _Positive = 2  # epochs from one decay to the next, at least 1
    decay_after_updates: _Count = 184_000  # updates before decay sets in; 60,000 for SVHN
    translate: _Count = 2  # pixels that an image is moved by at most on either axis, at least 0
    flip: bool = True  # mirror half of the images; False for SVHN
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of convolutions and matrix products
