"""Device memory: the error message when it runs out, and how to give it back.

The message names the setting to halve. It names no size that would fit: that depends on what else uses the device, and on
whether a CUDA graph, which needs memory of its own, can be recorded.
"""

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lsmix.data.errors import DeviceMemoryError

__all__ = ["BatchSetting", "artifact_label", "device_memory", "free_device_memory"]

# How torch and the libraries below it say that there is no memory, where they don't raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
_FREE = (
    "Free it of other programs ('nvidia-smi' lists them), or take a device with more memory, such as '--device cpu'."
)


@dataclass(frozen=True, kw_only=True)
class BatchSetting:
    """The setting of a recipe that decides how much memory a stage takes on the device."""

    label: str  # of the work, for people: "encode cifar10"
    device: str  # "cpu", "cuda" or "cuda:N"
    field: str  # of the recipe: "latents.batch_size"
    value: int  # images a pass
    others: Sequence[str] = ()  # other ways out, as lines of a recipe


@contextmanager
def device_memory(setting: BatchSetting | None, *, label: str = "", device: str = "") -> Iterator[None]:
    """Turn running out of a device's memory inside the block into an error that says what to change.

    What the failed pass held is freed, so the caller may try again with another setting.

    Args:
        setting: what to halve; None where there is no choice, as when a model is loaded.
        label: of the work, without a setting.
        device: likewise.

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
    if setting is None:
        raise DeviceMemoryError(f"{label}: device {device!r} ran out of memory ({why}). {_FREE}")
    raise DeviceMemoryError(
        f"{setting.label}: device {setting.device!r} ran out of memory with '{setting.field} = {setting.value}' ({why}). "
        f"{_way_out(setting)}"
    )


def free_device_memory() -> None:
    """Give memory that nothing uses any more back to the device, for other processes; does nothing without CUDA."""
    torch = sys.modules.get("torch")  # a process that never imported it holds nothing
    if torch is None or not torch.cuda.is_initialized():
        return
    import gc

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def artifact_label(folder: Path) -> tuple[str, str]:
    """Return the stage and the name of an artifact by its folder, ``<stage>/<name>-<key>``."""
    return folder.parent.name, folder.name.rpartition("-")[0]


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)


def _why(error: RuntimeError) -> str:
    """Return what torch says as far as it helps: how much was wanted and how much is free, or its first sentence."""
    text = str(error).partition("\n")[0]
    head, free, _ = text.partition(" is free")
    plain = text.partition("DefaultCPUAllocator: ")[2] or text
    return head + free if free else plain.partition(". ")[0].rstrip(".")


def _way_out(setting: BatchSetting) -> str:
    ways = [f"halve it to '{setting.field} = {setting.value // 2}'"] if setting.value > 1 else []
    ways += [f"set '{way}'" for way in setting.others]
    if not ways:
        return f"A smaller batch is impossible. {_FREE}"
    sentence = " or ".join(ways)
    return f"{sentence[0].upper()}{sentence[1:]}, and run again; this makes an artifact of another key, since it changes last bits."
