"""Training checkpoints: tensors and log in one safetensors file, which is replaced atomically.

Only the first rank reads and writes them.
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
    """Write the state and the log of a trainer, replacing the previous checkpoint."""
    from safetensors.torch import save

    if task.ranks.first:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainer.state_dict().items()}
        write_atomic(task.work / _NAME, save(tensors, metadata={_LOG: msgspec.json.encode(log).decode()}))


def load_checkpoint(task: StageTask, trainer: _Trainer, line: type[_Line]) -> list[_Line]:
    """Restore a trainer on every rank; return the log, a list of ``line``. Without a checkpoint, return [].

    Raises:
        CorruptError: The file is damaged.
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
            return {name: file.get_tensor(name) for name in file.keys()}, log  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, *DECODE_ERRORS, KeyError, TypeError) as error:
        raise CorruptError(f"checkpoint {str(path)!r} is damaged: {error}. Remove it to restart training.") from error
