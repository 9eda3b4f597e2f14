"""The precision and determinism of torch's kernels, set for one block of code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["arithmetic"]


@contextmanager
def arithmetic(precision: str = "float32", *, convolutions_only: bool = False) -> Iterator[None]:
    """Make kernels repeatable inside the block, and let CUDA compute float32 in TF32 for "tf32" only.

    With ``convolutions_only`` matrix products stay in full float32. A CPU always computes in full float32, whatever the
    caller has set. All settings are put back at the end.
    """
    # Operator by operator, through attributes that torch.backends makes at import and types as no such thing: once
    # these are set, torch's older flags such as allow_tf32 raise when they are read.
    cudnn, cuda, cpu = (getattr(torch.backends, name) for name in ("cudnn", "cuda", "mkldnn"))
    fast = "tf32" if precision == "tf32" else "ieee"
    settings: list[tuple[Any, str, Any]] = [
        *((operator, "fp32_precision", fast) for operator in (cudnn.conv, cudnn.rnn)),
        (cuda.matmul, "fp32_precision", "ieee" if convolutions_only else fast),
        *((operator, "fp32_precision", "ieee") for operator in (cpu.conv, cpu.rnn, cpu.matmul)),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
    ]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
