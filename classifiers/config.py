"""The configuration of a classifier and of its training. Imports no torch, so that recipes are read quickly."""

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
    """How the images of a batch are mixed with one another while a classifier is trained."""

    method: str  # a name in PIXEL_METHODS
    # λ ~ Beta(α, α), the share of the second image; above 0.
    alpha: Annotated[float, msgspec.Meta(gt=0.0, le=1e6)] = 1.0
    rate: Literal["per-sample", "per-batch"] = "per-sample"  # a λ for each image, or one for all of a batch

    def __post_init__(self) -> None:
        PIXEL_METHODS.check(self.method)


CNN13: Final = "cnn-13"  # the one of the paper, Table 5


class ClassifierTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a classifier is made and trained; the defaults are those of CNN-13 on CIFAR-10 [P B.2, B.3]."""

    architecture: str = CNN13  # cnn-13, wrn-D-K, timm:NAME or package.module:callable, see below
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)] = _CNN13_WIDTH  # of CNN-13: channels of the first block
    final_batch_norm: bool = False  # of CNN-13: batch norm on the logits; the paper has it for SVHN only
    epochs: _Epochs = 300  # passes over as many images as the train split has
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 128  # images in an update
    optimiser: Literal["adam", "sgd"] = "adam"  # adam has β 0.9 and 0.999
    momentum: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.9  # of sgd
    nesterov: bool = True  # of sgd: Nesterov's form, which needs a momentum
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0, le=1000.0)] = 0.0  # factor of ½‖v‖² over all parameters
    grad_clip: Annotated[float, msgspec.Meta(ge=0.0, le=1e12)] = 0.0  # largest norm of the gradient; 0: no limit
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=1000.0)] = 1e-3  # of the first update
    schedule: Literal["constant", "exponential", "cosine"] = "exponential"  # how the learning rate falls
    decay: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.97  # factor of one exponential decay
    decay_every_epochs: _Epochs = 2  # epochs from one decay to the next
    # updates before decay begins; the paper's 184,000 are more than 300 epochs of CIFAR-10 at batch 128
    decay_after_updates: Annotated[int, msgspec.Meta(ge=0, le=10**12)] = 184_000
    translate: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2  # largest shift in pixels; zeros move in
    flip: bool = True  # mirror half of the images left to right; wrong for digits
    normalise: Literal["none", "channel"] = "none"  # none: pixels in [0, 1]; channel: mean 0, variance 1
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of convolutions and products

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


_KNOWN = [CNN13, "wrn-28-10", "wrn-D-K", "timm:NAME", "PACKAGE.MODULE:CALLABLE"]
_MOST_DEPTH, _MOST_WIDENING = 1000, 64  # of a wide residual network
_WIDE_RESNET = re.compile(r"wrn-([0-9]{1,4})-([0-9]{1,3})")
_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TIMM = re.compile(r"[A-Za-z0-9_.]+")  # timm's "hf-hub:" and "local-dir:" would fetch or read untrusted files


def check_architecture(name: str) -> None:
    """Raise RecipeError unless ``name`` is an architecture whose package, if any, is installed."""
    if name == CNN13:
        return
    if depth_and_widening(name):
        return
    if name.startswith("timm:"):
        if not _TIMM.fullmatch(name.removeprefix("timm:")):
            raise RecipeError(f"{name!r} is no architecture: a name of timm has letters, digits, '_' and '.' only.")
        _check_installed(name, "timm", "pip install 'lsmix[timm]'")
    elif _CALLABLE.fullmatch(name):
        package = re.split(r"[.:]", name)[0]
        _check_installed(name, package, "Install the package that has it")
    else:
        raise RecipeError(f"unknown architecture {name!r}.{nearest(name, _KNOWN)}")


def depth_and_widening(name: str) -> tuple[int, int] | None:
    """Return depth D and widening factor K of "wrn-D-K"; None of another name.

    Raises:
        RecipeError: there is no network of this depth and width.
    """
    found = _WIDE_RESNET.fullmatch(name)
    if not found:
        return None
    depth, widening = found.groups()
    if not 10 <= int(depth) <= _MOST_DEPTH or (int(depth) - 4) % 6 or not 1 <= int(widening) <= _MOST_WIDENING:
        raise RecipeError(
            f"{name!r} is no wide residual network: in wrn-D-K, D is 6n + 4 (10, 16, 22, 28, …, {_MOST_DEPTH}) and K 1 to "
            f"{_MOST_WIDENING}, as in 'wrn-28-10'."
        )
    return int(depth), int(widening)


def _check_installed(name: str, package: str, remedy: str) -> None:
    # Python's own modules have no networks, but functions that an untrusted recipe must not call.
    if package in sys.stdlib_module_names:
        raise RecipeError(f"architecture {name!r} is of Python itself, which has no networks. Name one of a package.")
    # Looking for a top-level package imports nothing; "__main__" is the running script, not a package.
    if package == "__main__" or importlib.util.find_spec(package) is None:
        raise RecipeError(f"architecture {name!r} needs the package {package!r}, which is not installed. {remedy}.")
