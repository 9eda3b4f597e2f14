"""Checkpoints of a training: its tensors and its log, in one safetensors file that is replaced atomically."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from lsmix.data.atomic import DECODE_ERRORS, write_atomic
from lsmix.data.errors import CorruptError

if TYPE_CHECKING:
    import torch

__all__ = ["load_checkpoint", "save_checkpoint"]

_LOG = "log"
_Line = TypeVar("_Line", bound=msgspec.Struct)


def save_checkpoint(path: Path, tensors: dict[str, "torch.Tensor"], log: Sequence[msgspec.Struct]) -> None:
    """Write the tensors and the log of a training in place of its last checkpoint."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(whole, metadata={_LOG: msgspec.json.encode(log).decode()}))


def load_checkpoint(path: Path, line: type[_Line], load: Callable[[dict[str, "torch.Tensor"]], None]) -> list[_Line]:
    """Give the tensors, on the CPU, to ``load``, and return the log, a list of ``line``; [] if there is no checkpoint.

    Raises:
        CorruptError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            log = msgspec.json.decode(file.metadata()[_LOG], type=list[line])  # type: ignore[valid-type]  # known at runtime
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, *DECODE_ERRORS, KeyError, TypeError) as error:
        raise CorruptError(f"checkpoint {str(path)!r} is damaged: {error}. Remove it to start again.") from error
    load(tensors)
    return log
