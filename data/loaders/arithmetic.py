"""A context manager that sets the precision and determinism of torch's kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["arithmetic"]


@contextmanager
def arithmetic(precision: str = "float32", *, convolutions_only: bool = False) -> Iterator[None]:
    """Use deterministic kernels inside the block, and TF32 on CUDA only if ``precision`` is "tf32".

    With ``convolutions_only``, TF32 is limited to convolutions; matrix products use full float32. The CPU always uses
    full float32. The previous settings are restored at the end.
    """
    # The per-operator attributes are untyped, hence getattr. After setting them, reading torch's older flags such as
    # allow_tf32 raises.
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
