"""Device memory: the error message when it runs out, and how to release it.

The message names the setting to halve. It names no size that would fit: that depends on what else uses the device, and on
whether a CUDA graph, which needs memory of its own, can be recorded.
"""

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lsmix.data.errors import DeviceMemoryError

__all__ = ["device_memory", "free_device_memory"]

# How torch and the libraries below it say that there is no memory, where they don't raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
_FREE = (
    "Free it of other programs ('nvidia-smi' lists them), or take a device with more memory, such as '--device cpu'."
)


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
        if not _is_out_of_memory(error):
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


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
