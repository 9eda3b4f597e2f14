"""When a device's memory runs out: one sentence that names the setting, and a value of it that fits.

The one rule: a value is only named if it was tried, on this device and on input of the real shape, after the failure.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lsmix.data.errors import DeviceMemoryError

__all__ = ["BatchSetting", "artifact_label", "device_memory"]

Attempt = Callable[[int], object]  # does the work that failed with so many made-up images

# How torch and the libraries below it say that there is no memory, where they don't raise torch.OutOfMemoryError.
_WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
_FREE = (
    "Free it of other programs ('nvidia-smi' lists them), or take a device with more memory, such as '--device cpu'."
)


@dataclass(frozen=True, kw_only=True)
class BatchSetting:
    """The setting of a recipe that decides how much memory a stage takes on the device, and how to try others."""

    label: str  # of the work, for people: "encode cifar10"
    device: str  # "cpu", "cuda" or "cuda:N"
    field: str  # of the recipe: "latents.batch_size"
    value: int  # images a pass
    attempt: Attempt
    others: Sequence[tuple[str, Attempt]] = ()  # other ways out, by what to set


@contextmanager
def device_memory(setting: BatchSetting | None, *, label: str = "", device: str = "") -> Iterator[None]:
    """Turn running out of a device's memory inside the block into an error that says what fits.

    Args:
        setting: what to try smaller values of; None where there is no choice, as when a model is loaded.
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
    # Outside of the handler, so that nothing of the failed pass is alive while others are tried.
    if setting is None:
        raise DeviceMemoryError(f"{label}: device {device!r} ran out of memory ({why}). {_FREE}")
    raise DeviceMemoryError(f"{_what_happened(setting, why)} {_way_out(setting)}")


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


def _what_happened(setting: BatchSetting, why: str) -> str:
    return f"{setting.label}: device {setting.device!r} ran out of memory with '{setting.field} = {setting.value}' ({why})."


def _way_out(setting: BatchSetting) -> str:
    """Try smaller batches, and the other ways; return the sentence that says what fits."""
    fitting = next((value for value in _smaller(setting.value) if _fits(setting.attempt, value)), 0)
    ways = [f"'{setting.field} = {fitting}'"] if fitting else []
    ways += [f"'{way}'" for way, attempt in setting.others if _fits(attempt, setting.value)]
    if not ways:
        return f"Not even a batch of 1 fits. {_FREE}"
    return (
        f"Tried now, and it fits: {' or '.join(ways)}; set that and run again, which makes an artifact of another key, "
        "since it changes last bits."
    )


def _smaller(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value


def _fits(attempt: Attempt, images: int) -> bool:
    _free()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of work without a CUDA graph; what counts is whether it runs
            attempt(images)
    except Exception as error:  # noqa: BLE001 - whatever else is wrong with so few images, it is no way out
        traceback.clear_frames(error.__traceback__)
        return False
    finally:
        _free()
    return True


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
