"""The configuration of a flow and of its training. Imports no torch, so that recipes are read quickly."""

from typing import Annotated, Literal

import msgspec

from lsmix.data.rng import Seed

__all__ = ["Dequantise", "FlowConfig", "FlowShape", "FlowTraining", "Pad", "Scale"]

Scale = Literal["sigmoid", "tanh"]  # form of the coupling's scale
Pad = Literal["reflect", "refuse"]  # what becomes of sides that the squeezes don't divide
Dequantise = Literal["low-bits", "uniform", "center"]  # what fills the bits below the flow's


class FlowShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The architecture of a flow, without the images' shape. The caps limit what an untrusted checkpoint can allocate."""

    levels: Annotated[int, msgspec.Meta(ge=1, le=8)] = 3  # L: how often half of the channels is factored out
    steps: Annotated[int, msgspec.Meta(ge=1, le=256)] = 32  # K: steps in each level
    hidden: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128  # channels inside the coupling networks
    bits: Annotated[int, msgspec.Meta(ge=1, le=8)] = 5  # bits per value of the images that the flow models
    scale: Scale = "tanh"  # the coupling's scale: tanh for exp(½·tanh 2r), sigmoid for ½ + ½·sigmoid(r + 2)
    pad: Pad = "reflect"  # sides that are not multiples of 2^levels: reflect pads them, refuse is an error


class FlowConfig(FlowShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The architecture of a flow for images of one shape."""

    height: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # of the images, pixels
    width: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # of the images, pixels
    channels: Annotated[int, msgspec.Meta(ge=1, le=16)]  # of the images


class FlowTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a flow is trained. The defaults are the paper's for 32×32 images with flips [P B.3]."""

    iterations: Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] = 8200  # steps in all
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256  # images in a step
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1e-4  # of Adam, after the warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # how the rate changes after the warm-up; cosine: down to 0
    warmup: Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] = 0  # steps in which the learning rate grows from 0
    grad_clip: Annotated[float, msgspec.Meta(gt=0, le=1e12)] | None = 50.0  # largest norm, nats/dim; 1e9: no limit
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0  # factor of ½‖v‖² over all parameters
    flip: bool = True  # mirror half of the images left to right; wrong for digits
    translate: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2  # largest shift in pixels; zeros move in
    rows: Literal["all", "even", "odd"] = "all"  # rows of the train split to learn from
    seed: Seed = 0  # of weights, order, augmentation and noise
    # recompute activations in the backward pass: a tenth of the memory at K = 32, 0.85 of the speed; other last bits
    memory_light: bool = False
    # of the coupling networks on CUDA; a CPU computes tf32 as float32. Encoding and decoding are float32
    precision: Literal["float32", "tf32", "bf16"] = "tf32"
