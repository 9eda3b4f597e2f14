"""The device that a stage computes on: name, determinism, memory, and its description in the manifest.

The device is not part of a cache key, so an artifact has the same key on every device.
"""

import ctypes
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from lsmix.data.errors import DeviceMemoryError, RecipeError, format_count

__all__ = [
    "cpu_threads",
    "describe_environment",
    "device_memory",
    "device_name",
    "free_device_memory",
    "likely_device",
    "prepare_device",
    "resolve_device",
]

_PACKAGES = ("lsmix", "torch", "numpy", "h5py", "zarr", "dask", "pillow")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
# Parts of messages about a lack of memory that torch and its libraries don't raise as torch.OutOfMemoryError.
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
_FREE = "Stop other programs that use it ('nvidia-smi' lists them), or choose a device with more memory, such as '--device cpu'."


def resolve_device(device: str) -> str:
    """Resolve the requested device to "cpu", "cuda" or "cuda:N"; "auto" is CUDA if it is available.

    Raises:
        RecipeError: The device is unknown or not available.
    """
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        raise RecipeError(f"device {device!r} is unknown: expected 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if not torch.cuda.is_available():
        raise RecipeError(f"device {device!r} is not available: this machine has no CUDA device. Use '--device cpu'.")
    index = device.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {device!r} is not available: this machine has {format_count(torch.cuda.device_count(), 'CUDA device')}."
        )
    return device


def likely_device() -> str:
    """Guess "cuda" or "cpu" from NVIDIA's driver and the build of torch, without importing torch."""
    driver = Path("/dev/nvidiactl").exists()
    return "cuda" if driver and not metadata.version("torch").endswith("+cpu") else "cpu"


def prepare_device(device: str) -> None:
    """Make torch deterministic on this device, and make the C library keep freed memory."""
    # cuBLAS reads this when its first handle is created; without it CUDA matrix products are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    # Like use_deterministic_algorithms(True, warn_only=True), which also imports torch's compiler and takes a second.
    torch.set_deterministic_debug_mode("warn")
    # The line above also makes torch fill new memory with NaN, a debugging aid that costs 4%.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of torch
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make the C library keep freed memory instead of returning it to the kernel.

    A training step frees and allocates hundreds of megabytes; on one core the resulting page faults took 10 to 14% of
    the step. The peak memory of the process stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside the block.

    On a CPU the last bits of a gradient depend on the number of threads (observed with one and two), so the number is
    part of a training's configuration and key.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_environment(device: str = "") -> dict[str, Any]:
    """Return versions and platform, and with a device its name and settings, for the manifest."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    if device:
        import torch

        facts["device"] = device_name(device)
        facts["device_kind"] = device.partition(":")[0]
        facts["deterministic_algorithms"] = torch.are_deterministic_algorithms_enabled()
    return facts


def device_name(device: str) -> str:
    """Return the product name of the processor or GPU that "cpu", "cuda" or "cuda:N" refers to."""
    if not device.startswith("cuda"):
        return _processor()
    import torch

    return torch.cuda.get_device_name(device)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a kernel file, not a path
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def device_memory(
    label: str, device: str, setting: str = "", value: int = 0, others: Sequence[str] = ()
) -> Iterator[None]:
    """Convert out-of-memory errors in the block to a ``DeviceMemoryError`` that says which setting to change.

    Memory of the failed pass is freed, so the caller may retry with another setting.

    Args:
        label: What is being computed, for the message: "encode cifar10".
        device: "cpu", "cuda" or "cuda:N".
        setting: Field of the recipe that determines the memory use, such as "latents.batch_size"; "" if there is none,
            as when a model is loaded.
        value: Value of the setting, in images.
        others: Alternatives, as lines of a recipe.

    Raises:
        DeviceMemoryError: The device ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        import torch

        if not (isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)):
            raise
        why = _why(error)
        traceback.clear_frames(error.__traceback__)  # its variables reference tensors of the failed pass
    else:
        return
    # Outside the handler, because the context of the new error would keep the failed pass alive.
    used = f" with '{setting} = {value}'" if setting else ""
    raise DeviceMemoryError(
        f"{label}: device {device!r} ran out of memory{used} ({why}). {_advice(setting, value, others)}"
    )


def free_device_memory() -> None:
    """Release unused CUDA memory to other processes; does nothing without CUDA."""
    torch = sys.modules.get("torch")  # without torch there is no CUDA memory
    if torch is None or not torch.cuda.is_initialized():
        return
    import gc

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _why(error: RuntimeError) -> str:
    """Return the useful part of torch's message: the requested and free memory, or else the first sentence."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    head, free, _ = text.partition(" is free")
    return head + free if free else text.partition(". ")[0].rstrip(".")


def _advice(setting: str, value: int, others: Sequence[str]) -> str:
    if not setting:
        return _FREE
    ways = [f"reduce it to '{setting} = {value // 2}'"] if value > 1 else []
    sentence = " or ".join([*ways, *(f"set '{way}'" for way in others)])
    if not sentence:
        return f"The batch cannot be smaller. {_FREE}"
    return f"{sentence[0].upper()}{sentence[1:]}, and run again. This changes the last bits of the result, so the artifact gets another key."
