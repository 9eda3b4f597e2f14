"""Checkpoints of work under way: tensors with facts beside them, in one safetensors file that is replaced at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from lsmix.data.atomic import DECODE_ERRORS, write_atomic
from lsmix.data.errors import CorruptError

if TYPE_CHECKING:
    import torch

__all__ = ["facts_as", "load_checkpoint", "save_checkpoint"]

_FACTS = "facts"
_Fact = TypeVar("_Fact")


def save_checkpoint(path: Path, tensors: dict[str, "torch.Tensor"], facts: dict[str, Any]) -> None:
    """Write tensors, and facts that JSON can hold, in place of the checkpoint before."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(whole, metadata={_FACTS: msgspec.json.encode(facts).decode()}))


def load_checkpoint(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]] | None:
    """Return the tensors, on the CPU, and the facts of a checkpoint; None where there is none.

    Raises:
        CorruptError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = msgspec.json.decode(file.metadata()[_FACTS], type=dict[str, Any])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, *DECODE_ERRORS, KeyError, TypeError) as error:
        raise CorruptError(f"checkpoint {str(path)!r} is damaged: {error}. Remove it to begin anew.") from error


def facts_as(facts: dict[str, Any], name: str, kind: type[_Fact], path: Path) -> _Fact:
    """Return one of a checkpoint's facts, of the kind that it must be.

    Raises:
        CorruptError: it is missing or of another kind; ``path`` is the checkpoint, for the message.
    """
    try:
        return msgspec.convert(facts.get(name), kind)
    except msgspec.ValidationError as error:
        raise CorruptError(
            f"checkpoint {str(path)!r} is damaged: of {name!r} it says: {error}. Remove it to begin anew."
        ) from error
