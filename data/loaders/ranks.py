"""Data-parallel training: each rank computes its part of every batch, then all ranks average their gradients.

torch is imported only for communication, because stages use ``Ranks`` in processes that do not import torch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from lsmix.data.errors import LsmixError
from lsmix.data.progress import asked, stop_point

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "LostRankError", "Ranks", "join_ranks"]

# Ranks must wait while the first rank works alone. A timeout is not needed to detect lost ranks: when a rank exits, its
# connections close, and the other ranks notice that immediately.
_TIMEOUT = timedelta(days=365)


class LostRankError(LsmixError):
    """Another rank has exited."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rank of this process in data-parallel training. ``Ranks()`` stands for training in a single process.

    Methods that communicate raise LostRankError if another rank has exited.

    Example:
        >>> from lsmix.data.loaders.ranks import Ranks
        >>> [Ranks(rank=rank, size=2).part(8) for rank in range(2)]
        [slice(0, 4, None), slice(4, 8, None)]
    """

    rank: int = 0
    size: int = 1
    size_here: int = 1  # ranks on this machine

    @property
    def first(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this rank's rows of a batch of ``count``."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def threads(self, count: int) -> int:
        """Return this rank's share of ``count`` CPU threads of its machine."""
        return max(1, count // self.size_here)

    def average(self, tensors: Sequence["Tensor"]) -> None:
        """Replace tensors, all of the same dtype, by their means over all ranks."""
        if self.size == 1 or not tensors:
            return
        import torch

        with torch.no_grad():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            with _connected():
                torch.distributed.all_reduce(flat)
            means = torch.split(flat / self.size, [tensor.numel() for tensor in tensors])
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def broadcast(self, value: Any = None) -> Any:
        """Return the first rank's value on all ranks. Tensors in it must be on the CPU."""
        if self.size == 1:
            return value
        from torch import distributed

        values = [value]
        with _connected():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def stop_point(self) -> None:
        """Raise KeyboardInterrupt on all ranks if one of them received a signal to stop."""
        if self.size == 1:
            stop_point()
            return
        import torch

        stop = torch.tensor(asked.is_set(), dtype=torch.uint8)
        with _connected():
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
        if stop:
            raise KeyboardInterrupt


ALONE: Final = Ranks()


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # raised by gloo and NCCL
        raise LostRankError(
            "another rank exited, so this rank stops too. Completed work is kept. Fix the problem that the other rank "
            "reported, and run the command again."
        ) from error


def join_ranks() -> Ranks:
    """Join the process group of torchrun and return this process's rank."""
    import torch

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _connected():
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    return Ranks(
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        size_here=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
