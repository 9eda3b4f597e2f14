"""Running a function on a device over batches of NumPy arrays, and copying its results back to NumPy.

On the CPU the function works on the arrays' own memory. On CUDA the next batch is copied to the device, and the previous
result back, while the current batch is computed; the host waits once per batch, for a result whose successor is queued.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lsmix.data.loaders.batch import to_device

__all__ = ["run_batches"]

_Load = Callable[[slice], Sequence[np.ndarray]]
_Compute = Callable[[slice, Sequence[torch.Tensor]], Sequence[torch.Tensor]]
_Batches = Iterator[tuple[slice, list[np.ndarray]]]


def run_batches(device: torch.device, batches: Iterable[slice], load: _Load, compute: _Compute) -> _Batches:
    """Yield each batch with what ``compute`` returns for it, as NumPy arrays that the caller may keep.

    Args:
        device: where ``compute`` works.
        batches: the rows of each batch.
        load: returns the arrays of a batch; it is called one batch ahead.
        compute: gets the rows and their arrays as tensors on the device; must not write to them, or wait for the device.
    """
    return (_overlapped if device.type == "cuda" else _one_by_one)(device, batches, load, compute)


def _one_by_one(device: torch.device, batches: Iterable[slice], load: _Load, compute: _Compute) -> _Batches:
    for rows in batches:
        results = compute(rows, [_tensor(array).to(device) for array in load(rows)])
        yield rows, [result.cpu().numpy() for result in results]


class _Begun(NamedTuple):
    rows: slice
    results: list[torch.Tensor]  # pinned on the host
    arrived: torch.cuda.Event  # after which they can be read
    held: list[torch.Tensor]  # on the device; freed once ``arrived``, since other streams still use their memory


def _overlapped(device: torch.device, batches: Iterable[slice], load: _Load, compute: _Compute) -> _Batches:
    sending, fetching = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own
    computing = torch.cuda.current_stream(device)
    waiting, begun = iter(batches), deque[_Begun]()

    def sent() -> tuple[slice, list[torch.Tensor], torch.cuda.Event] | None:
        """Begin to copy the next batch to the device."""
        rows = next(waiting, None)
        if rows is None:
            return None
        on_host = [_tensor(array) for array in load(rows)]
        with torch.cuda.stream(sending):
            tensors = [to_device(values, device) for values in on_host]
        return rows, tensors, _recorded(sending)

    ahead = sent()
    while ahead is not None:
        rows, tensors, there = ahead
        computing.wait_event(there)
        results = compute(rows, tensors)
        fetching.wait_event(_recorded(computing))
        with torch.cuda.stream(fetching):
            pinned = [_copied(result, _pinned_like(result)) for result in results]
        begun.append(_Begun(rows, pinned, _recorded(fetching), [*tensors, *results]))
        ahead = sent()  # while the device computes
        if len(begun) > 1:
            yield _finished(begun.popleft())
    while begun:
        yield _finished(begun.popleft())


def _finished(batch: _Begun) -> tuple[slice, list[np.ndarray]]:
    batch.arrived.synchronize()
    return batch.rows, [result.numpy() for result in batch.results]


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record(stream)
    return event


def _copied(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return target.copy_(source, non_blocking=True)


def _pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Return memory that a device copies from and to by itself; torch gives it out again only after such a copy."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


def _tensor(array: np.ndarray) -> torch.Tensor:
    # torch shares memory only with arrays that may be written; rows of a store may not be.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
