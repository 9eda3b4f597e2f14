"""Run a function on a device over batches of NumPy arrays and copy its results back to NumPy.

On the CPU, the function reads the arrays' memory directly. On CUDA, the next batch is copied to the device and the
previous result back while the current batch is computed; the host waits for a result after queueing the next batch.
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
    """Yield the rows of each batch and the results of ``compute`` as NumPy arrays, which the caller may keep.

    Args:
        device: Device on which ``compute`` runs.
        batches: The rows of each batch.
        load: Returns the arrays of a batch; called one batch in advance.
        compute: Receives rows and arrays as tensors on the device; must not write to these or wait for the device.
    """
    return (_overlapped if device.type == "cuda" else _one_by_one)(device, batches, load, compute)


def _one_by_one(device: torch.device, batches: Iterable[slice], load: _Load, compute: _Compute) -> _Batches:
    for rows in batches:
        results = compute(rows, [_tensor(array).to(device) for array in load(rows)])
        yield rows, [result.cpu().numpy() for result in results]


class _Pending(NamedTuple):
    rows: slice
    results: list[torch.Tensor]  # pinned on the host
    copied: torch.cuda.Event  # set when the results have been copied
    in_use: list[torch.Tensor]  # on the device; freed after ``copied``, since other streams use them


def _overlapped(device: torch.device, batches: Iterable[slice], load: _Load, compute: _Compute) -> _Batches:
    sending, receiving = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    computing = torch.cuda.current_stream(device)
    remaining, pending = iter(batches), deque[_Pending]()

    def send_next() -> tuple[slice, list[torch.Tensor], torch.cuda.Event] | None:
        """Start copying the next batch to the device."""
        rows = next(remaining, None)
        if rows is None:
            return None
        on_host = [_tensor(array) for array in load(rows)]
        with torch.cuda.stream(sending):
            tensors = [to_device(values, device) for values in on_host]
        return rows, tensors, _recorded(sending)

    ahead = send_next()
    while ahead is not None:
        rows, tensors, sent = ahead
        computing.wait_event(sent)
        results = compute(rows, tensors)
        receiving.wait_event(_recorded(computing))
        with torch.cuda.stream(receiving):
            pinned = [_copied(result, _pinned_like(result)) for result in results]
        pending.append(_Pending(rows, pinned, _recorded(receiving), [*tensors, *results]))
        ahead = send_next()  # while the device computes
        if len(pending) > 1:
            yield _finished(pending.popleft())
    while pending:
        yield _finished(pending.popleft())


def _finished(batch: _Pending) -> tuple[slice, list[np.ndarray]]:
    batch.copied.synchronize()
    return batch.rows, [result.numpy() for result in batch.results]


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record(stream)
    return event


def _copied(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return target.copy_(source, non_blocking=True)


def _pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Return page-locked host memory for asynchronous copies; torch reuses it only after the copy has finished."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)


def _tensor(array: np.ndarray) -> torch.Tensor:
    # torch shares memory with writable arrays only; rows from a Zarr store may be read-only.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
