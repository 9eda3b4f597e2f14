"""Checkpoints of a training: its tensors and its log, in one safetensors file that is replaced atomically.

The first rank writes and reads them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from lsmix.data.atomic import DECODE_ERRORS, write_atomic
from lsmix.data.errors import CorruptError
from lsmix.pipeline.engine.stage import StageTask

if TYPE_CHECKING:
    import torch

__all__ = ["load_checkpoint", "save_checkpoint"]

_NAME = "checkpoint.safetensors"
_LOG = "log"
_Line = TypeVar("_Line", bound=msgspec.Struct)


class _Trainer(Protocol):
    def state_dict(self) -> dict[str, "torch.Tensor"]: ...

    def load_state_dict(self, state: dict[str, "torch.Tensor"]) -> None: ...


def save_checkpoint(task: StageTask, trainer: _Trainer, log: Sequence[msgspec.Struct]) -> None:
    """Write the state and the log of a training in place of its last checkpoint."""
    from safetensors.torch import save

    if task.ranks.first:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state_dict().items()}
        write_atomic(task.work / _NAME, save(whole, metadata={_LOG: msgspec.json.encode(log).decode()}))


def load_checkpoint(task: StageTask, trainer: _Trainer, line: type[_Line]) -> list[_Line]:
    """Restore a trainer on every rank; return the log, a list of ``line``; [] if there is no checkpoint.

    Raises:
        CorruptError: the file is damaged.
    """
    log: list[_Line]
    tensors, log = task.ranks.broadcast(_read(task.work / _NAME, line) if task.ranks.first else ({}, []))
    if tensors:
        trainer.load_state_dict(tensors)
    return log


def _read(path: Path, line: type[_Line]) -> tuple[dict[str, "torch.Tensor"], list[_Line]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}, []
    try:
        with safe_open(path, framework="pt") as file:
            log = msgspec.json.decode(file.metadata()[_LOG], type=list[line])  # type: ignore[valid-type]  # known at runtime
            return {name: file.get_tensor(name) for name in file.keys()}, log  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, *DECODE_ERRORS, KeyError, TypeError) as error:
        raise CorruptError(f"checkpoint {str(path)!r} is damaged: {error}. Remove it to start again.") from error
