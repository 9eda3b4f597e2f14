"""Predictions of a roofline model for one NVIDIA H100, accurate to about ±40%, to compare with each measured number.

They apply to the paper's flow (L = 3, K = 32, width 128, 32×32×3) and to CNN-13 of width 128.
"""

import numpy as np

__all__ = [
    "CARD",
    "COPY_SECONDS",
    "ENCODE_SECONDS",
    "classifier_step_ms",
    "decode_ms",
    "flow_step_ms",
]

CARD = "one NVIDIA H100"
ENCODE_SECONDS = 5.0  # to encode 50,000 images and decode them again, disk to disk
COPY_SECONDS = 2.2  # to mix one copy of 50,000 images, disk to disk

_DECODE_BATCHES = (64, 256, 512, 4096)
_DECODE_MS = tuple(1000.0 * batch / rate for batch, rate in zip(_DECODE_BATCHES, (14e3, 23e3, 25e3, 26e3), strict=True))
_FLOW_STEP_MS = {"float32": 45.0, "tf32": 1000.0 * 3.6 * 60 / 8200}  # batch 256, the next batch prepared in parallel
_CNN13_MINUTES = {"float32": 36.0, "tf32": 12.0, "bf16": 8.0}  # 300 epochs of 50,000 images
_CNN13_STEPS = 300 * 391
_CNN13_MACS = 730e6  # multiply-adds per image, forward
_WRN_MACS = 5.25e9  # of WRN-28-10


def decode_ms(batch: int) -> float:
    """Return the milliseconds to decode (or encode) a batch with fused convolutions and a recorded graph."""
    return float(np.interp(batch, _DECODE_BATCHES, _DECODE_MS))


def flow_step_ms(precision: str) -> float | None:
    """Return the milliseconds of a training step of 256 images, or None if the model has no prediction."""
    return _FLOW_STEP_MS.get(precision)


def classifier_step_ms(architecture: str, precision: str) -> float:
    """Return the milliseconds of a training step of 128 images; WRN-28-10 at the FLOP rate of CNN-13."""
    cnn13 = 60e3 * _CNN13_MINUTES[precision] / _CNN13_STEPS
    return cnn13 if architecture == "cnn-13" else cnn13 * _WRN_MACS / _CNN13_MACS
