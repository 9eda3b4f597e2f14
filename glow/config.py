"""Configuration of a flow and of its training. Does not import torch, so that recipes load quickly."""

from typing import Annotated, Literal

import msgspec

from lsmix.data.rng import Seed

__all__ = ["Dequantise", "FlowConfig", "FlowShape", "FlowTraining", "Pad", "Scale"]

Scale = Literal["sigmoid", "tanh"]  # form of the coupling's scale
Pad = Literal["reflect", "refuse"]  # what to do with sides that the squeezes cannot halve evenly
Dequantise = Literal["low-bits", "uniform", "center"]  # how the bits below the flow's bit depth are filled


class FlowShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Architecture of a flow, without the image shape. The caps limit what an untrusted checkpoint can allocate."""

    levels: Annotated[int, msgspec.Meta(ge=1, le=8)] = 3  # L: levels; each one factors out half of its channels
    steps: Annotated[int, msgspec.Meta(ge=1, le=256)] = 32  # K: steps per level
    hidden: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128  # channels inside the coupling networks
    bits: Annotated[int, msgspec.Meta(ge=1, le=8)] = 5  # bits per channel value that the flow models
    scale: Scale = "tanh"  # the coupling's scale: tanh for exp(½·tanh 2r), sigmoid for ½ + ½·sigmoid(r + 2)
    pad: Pad = "reflect"  # if a side is not a multiple of 2^levels: reflect pads the image, refuse raises an error


class FlowConfig(FlowShape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Architecture of a flow for images of one shape."""

    height: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # image height, pixels
    width: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # image width, pixels
    channels: Annotated[int, msgspec.Meta(ge=1, le=16)]  # image channels


class FlowTraining(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Training options of a flow. The defaults are the paper's for 32×32 images with flips [P B.3]."""

    iterations: Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] = 8200  # total number of training steps
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 256  # images per step
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1e-4  # Adam's learning rate after the warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # learning rate after the warm-up; cosine decays it to 0
    warmup: Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] = 0  # steps of linear learning-rate warm-up from 0
    grad_clip: Annotated[float, msgspec.Meta(gt=0, le=1e12)] | None = 50.0  # maximum gradient norm, nats/dim; 1e9: none
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0  # coefficient of ½‖v‖² over all parameters
    flip: bool = True  # mirror images left to right with probability ½; disable for digits
    translate: Annotated[int, msgspec.Meta(ge=0, le=64)] = 2  # maximum random shift, pixels; zero-padded
    rows: Literal["all", "even", "odd"] = "all"  # rows of the train split to train on
    seed: Seed = 0  # seed of weights, image order, augmentation and noise
    # recompute activations in the backward pass: at K = 32, 0.1× memory, 0.85× speed; changes the last bits of results
    memory_light: bool = False
    # precision of the coupling networks on CUDA; CPUs run tf32 as float32. Encoding and decoding always use float32
    precision: Literal["float32", "tf32", "bf16"] = "tf32"
