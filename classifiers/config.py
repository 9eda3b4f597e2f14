"""Configuration of a classifier and of its training. Does not import torch, so that recipes load quickly."""

import importlib.util
import re
import sys
from typing import Annotated, Final, Literal

import msgspec

from lsmix.data.errors import RecipeError
from lsmix.data.mixing import PIXEL_METHODS, nearest

__all__ = ["CNN13", "ClassifierTraining", "PixelMix", "check_architecture", "depth_and_widening"]

_Epochs = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
_CNN13_WIDTH = 128  # [P Table 5]


class PixelMix(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the images of a training batch are mixed with each other."""

    method: str  # a pixel method registered in PIXEL_METHODS
    # λ ~ Beta(α, α) is the share of the second image; α above 0
    alpha: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    rate: Literal["per-sample", "per-batch"] = "per-sample"  # one λ for each image, or one for the batch

    def __post_init__(self) -> None:
        PIXEL_METHODS.check(self.method)


CNN13: Final = "cnn-13"  # the paper's network [P Table 5]


class ClassifierTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Architecture and training of a classifier. The defaults are the paper's for CNN-13 on CIFAR-10 [P B.2, B.3]."""

    architecture: str = CNN13  # cnn-13, wrn-D-K, timm:NAME or package.module:callable; see below
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)] = _CNN13_WIDTH  # CNN-13 only: channels of the first block
    final_batch_norm: bool = False  # CNN-13 only: batch norm on the logits; the paper uses it for SVHN
    epochs: _Epochs = 300  # number of epochs, each as many images as the train split has
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 128  # images per update
    optimiser: Literal["adam", "sgd"] = "adam"  # adam uses β = 0.9 and 0.999
    momentum: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.9  # sgd only
    nesterov: bool = True  # sgd only: Nesterov momentum; needs momentum above 0
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] = 0.0  # coefficient of ½‖v‖² over all parameters
    grad_clip: Annotated[float, msgspec.Meta(ge=0.0, le=1e12)] = 0.0  # maximum gradient norm; 0: no limit
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=1000.0)] = 1e-3  # initial learning rate
    schedule: Literal["constant", "exponential", "cosine"] = "exponential"  # learning-rate schedule
    decay: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.97  # exponential schedule: factor of each decay
    decay_every_epochs: _Epochs = 2  # exponential schedule: epochs between decays
    # exponential schedule: updates before the first decay; 300 epochs of CIFAR-10 have fewer than the paper's 184,000
    decay_after_updates: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 184_000
    translate: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2  # maximum random shift, pixels; zero-padded
    flip: bool = True  # mirror images left to right with probability ½; disable for digits
    normalise: Literal["none", "channel"] = "none"  # none: pixels in [0, 1]; channel: mean 0, variance 1 per channel
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # precision of convolutions and matrix products

    def __post_init__(self) -> None:
        check_architecture(self.architecture)
        if self.architecture != CNN13 and (self.width != _CNN13_WIDTH or self.final_batch_norm):
            raise RecipeError(
                f"width and final_batch_norm apply to {CNN13!r} only; remove them for {self.architecture!r}. "
                "The name of a wide residual network contains its depth and width."
            )
        if self.optimiser == "sgd" and self.nesterov and not self.momentum:
            raise RecipeError(
                "optimiser 'sgd' with nesterov needs a momentum above 0. Set 'nesterov = false' or a 'momentum'."
            )


_KNOWN = [CNN13, "wrn-28-10", "wrn-D-K", "timm:NAME", "PACKAGE.MODULE:CALLABLE"]
_MAX_DEPTH, _MAX_WIDENING = 1000, 64  # of wide residual networks
_WIDE_RESNET = re.compile(r"wrn-([0-9]{1,4})-([0-9]{1,3})")
_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TIMM = re.compile(r"[A-Za-z0-9_.]+")  # excludes timm's "hf-hub:" and "local-dir:", which read untrusted files


def check_architecture(name: str) -> None:
    """Raise RecipeError unless ``name`` is a valid architecture and the package that it needs is installed."""
    if name == CNN13:
        return
    if depth_and_widening(name):
        return
    if name.startswith("timm:"):
        if not _TIMM.fullmatch(name.removeprefix("timm:")):
            raise RecipeError(f"{name!r} is not an architecture: timm names contain only letters, digits, '_' and '.'.")
        _check_installed(name, "timm", "pip install 'lsmix[timm]'")
    elif _CALLABLE.fullmatch(name):
        package = re.split(r"[.:]", name)[0]
        _check_installed(name, package, "Install it")
    else:
        raise RecipeError(f"unknown architecture {name!r}.{nearest(name, _KNOWN)}")


def depth_and_widening(name: str) -> tuple[int, int] | None:
    """Return depth D and widening factor K of "wrn-D-K"; None for other names.

    Raises:
        RecipeError: D or K is invalid.
    """
    found = _WIDE_RESNET.fullmatch(name)
    if not found:
        return None
    depth, widening = found.groups()
    if not 10 <= int(depth) <= _MAX_DEPTH or (int(depth) - 4) % 6 or not 1 <= int(widening) <= _MAX_WIDENING:
        raise RecipeError(
            f"{name!r} is not a wide residual network: in wrn-D-K, D must be 6n + 4 (10, 16, 22, 28, …, {_MAX_DEPTH}) "
            f"and K 1 to {_MAX_WIDENING}, for example 'wrn-28-10'."
        )
    return int(depth), int(widening)


def _check_installed(name: str, package: str, remedy: str) -> None:
    # The standard library has no networks, but functions that an untrusted recipe must not call.
    if package in sys.stdlib_module_names:
        raise RecipeError(f"architecture {name!r} is in Python's standard library. Name one from another package.")
    # find_spec imports nothing for a top-level package; "__main__" is the running script, not a package.
    if package == "__main__" or importlib.util.find_spec(package) is None:
        raise RecipeError(f"architecture {name!r} needs the package {package!r}, which is not installed. {remedy}.")
