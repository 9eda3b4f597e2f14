"""The device that a stage computes on: its name, determinism and memory, and what the manifest says of it.

None of it is part of a key: the same recipe is the same artifact on every device.
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

from lsmix.data.errors import DeviceMemoryError, RecipeError

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
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# How torch and the libraries below it say that there is no memory, where they don't raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
_FREE = (
    "Free it of other programs ('nvidia-smi' lists them), or take a device with more memory, such as '--device cpu'."
)


def resolve_device(device: str) -> str:
    """Return "cpu", "cuda" or "cuda:N" for what the user asked for; "auto" takes CUDA where there is one.

    Raises:
        RecipeError: there is no such device.
    """
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        raise RecipeError(f"device {device!r} is unknown: expected 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if not torch.cuda.is_available():
        raise RecipeError(f"device {device!r} was asked for, but this machine has no CUDA device. Use '--device cpu'.")
    index = device.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {device!r} is not there: this machine has {torch.cuda.device_count()} CUDA device(s)."
        )
    return device


def likely_device() -> str:
    """Return "cuda" where NVIDIA's driver is at hand and torch is no build for the CPU, else "cpu", without importing torch."""
    driver = Path("/dev/nvidiactl").exists()
    return "cuda" if driver and not metadata.version("torch").endswith("+cpu") else "cpu"


def prepare_device(device: str) -> None:
    """Set torch to give the same bytes each time on this device, and the process to keep memory that it will want again."""
    # cuBLAS reads this when its first handle is made; without it torch refuses deterministic matrix products on CUDA.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    # As use_deterministic_algorithms(True, warn_only=True), which imports torch's compiler besides: a second.
    torch.set_deterministic_debug_mode("warn")
    # Filling new memory with NaN, which comes with the line above, finds reads of unwritten memory; it costs 4%.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch makes it a property
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of handing it back to the kernel.

    A training step frees hundreds of megabytes and asks for them again at once; on one core the page faults of that were
    seen to take 10 to 14% of the step. What the process holds at most stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads inside the block.

    On a CPU the last bits of a gradient depend on the number of threads (seen with one against two), so a training has
    its number in its configuration, and with it in its key.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_environment(device: str = "") -> dict[str, Any]:
    """Return versions, platform and, for stages that compute with torch, the device by name."""
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
    """Return what the maker calls the processor or graphics card that "cpu", "cuda" or "cuda:N" stands for."""
    if not device.startswith("cuda"):
        return _processor()
    import torch

    return torch.cuda.get_device_name(device)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - no path object for a kernel's file
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
    """Turn running out of a device's memory inside the block into an error that says what to change.

    What the failed pass held is freed, so the caller may try again with another setting.

    Args:
        label: of the work, for people: "encode cifar10".
        device: "cpu", "cuda" or "cuda:N".
        setting: of the recipe, which decides how much memory is used, such as "latents.batch_size"; "" where there is no
            choice, as when a model is loaded.
        value: of the setting, in images.
        others: other ways out, as lines of a recipe.

    Raises:
        DeviceMemoryError: it ran out.
    """
    try:
        yield
    except RuntimeError as error:
        import torch

        if not (isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)):
            raise
        why = _why(error)
        traceback.clear_frames(error.__traceback__)  # whose variables hold what the failed pass had made so far
    else:
        return
    # Outside of the handler, or the error raised here would keep the failed pass alive as its context.
    used = f" with '{setting} = {value}'" if setting else ""
    raise DeviceMemoryError(
        f"{label}: device {device!r} ran out of memory{used} ({why}). {_advice(setting, value, others)}"
    )


def free_device_memory() -> None:
    """Release memory that nothing uses any more to other processes; does nothing without CUDA."""
    torch = sys.modules.get("torch")  # a process that never imported it holds nothing
    if torch is None or not torch.cuda.is_initialized():
        return
    import gc

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _why(error: RuntimeError) -> str:
    """Return what torch says as far as it helps: how much was wanted and how much is free, or its first sentence."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    head, free, _ = text.partition(" is free")
    return head + free if free else text.partition(". ")[0].rstrip(".")


def _advice(setting: str, value: int, others: Sequence[str]) -> str:
    if not setting:
        return _FREE
    ways = [f"halve it to '{setting} = {value // 2}'"] if value > 1 else []
    sentence = " or ".join([*ways, *(f"set '{way}'" for way in others)])
    if not sentence:
        return f"A smaller batch is impossible. {_FREE}"
    return f"{sentence[0].upper()}{sentence[1:]}, and run again; this makes an artifact of another key, since it changes last bits."
