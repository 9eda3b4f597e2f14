"""Checkpoints of work under way: tensors with facts beside them, in one safetensors file that is replaced at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lsmix.data.durable import write_durably
from lsmix.data.errors import CorruptError

if TYPE_CHECKING:
    import torch

__all__ = ["load_checkpoint", "save_checkpoint"]

_FACTS = "facts"
_THREADS = "threads"


def save_checkpoint(path: Path, tensors: dict[str, "torch.Tensor"], facts: dict[str, Any]) -> None:
    """Write tensors, and facts that JSON can hold, in place of the checkpoint before."""
    import torch
    from safetensors.torch import save

    facts = {**facts, _THREADS: torch.get_num_threads()}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_durably(path, save(whole, metadata={_FACTS: msgspec.json.encode(facts).decode()}))


def load_checkpoint(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]] | None:
    """Return the tensors, on the CPU, and the facts of a checkpoint; None where there is none.

    Torch goes back to as many threads as it had then: on a CPU the last bits of a gradient depend on their number, and
    a resumed training is to end with the bytes of an undisturbed one.

    Raises:
        CorruptError: the file is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = msgspec.json.decode(file.metadata()[_FACTS], type=dict[str, Any])
            torch.set_num_threads(int(facts.pop(_THREADS)))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no mapping
    except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"checkpoint {str(path)!r} is damaged: {error}. Remove it to begin anew.") from error
