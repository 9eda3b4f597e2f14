"""CUDA graphs: record a function once and replay it, instead of launching thousands of small kernels for each call.

A recording is used only if its first replay gives bitwise the same results as a plain call. If recording fails or the
results differ, the function is called normally from then on, with a warning.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol

import torch

__all__ = ["Replayed", "can_record"]

_WARM_UPS = 2  # plain calls on the recording stream, in which libraries create their handles and workspaces
_RECORDED_ON = frozenset({"cuda"})  # device types
_MAX_RECORDINGS = 4  # per ``Replayed``; each keeps the memory of an entire call allocated
_Function = Callable[..., Sequence[torch.Tensor]]


class _Graph(Protocol):
    def replay(self) -> None: ...


class _Recording(NamedTuple):
    graph: _Graph
    inputs: list[torch.Tensor]
    results: list[torch.Tensor]
    addresses: tuple[int, ...]  # of the state tensors that the graph reads and writes


def can_record(device: torch.device) -> bool:
    """Return whether work on this device can be recorded."""
    return device.type in _RECORDED_ON


class Replayed:
    """A function of tensors that is recorded at its first call with given input shapes and replayed at later calls.

    The function must not synchronise with the device, and must read everything but its inputs from the same memory at
    each call. It may draw from the device's global generator: a replay draws the same numbers as a plain call.
    Results are copies that later calls do not change. Recordings are kept for the four most recently used combinations
    of input shapes. On the CPU, the function is called without recording.

    Args:
        function: The function to record.
        state: Returns the other tensors that the function writes, and those it reads that may move in memory, such as
            parameters. If one of them moves, the function is recorded again.
    """

    def __init__(self, function: _Function, state: Callable[[], Sequence[torch.Tensor]] = tuple) -> None:
        self._function = function
        self._state = state
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}  # least recently used first
        self._plain = False

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Call the function; all inputs must be on the same device."""
        if self._plain or not can_record(inputs[0].device):
            return list(self._function(*inputs))
        with _device_guard(inputs[0].device):
            state, shapes = self._state(), tuple([x.shape for x in inputs])
            recording = self._recordings.pop(shapes, None)
            if recording is None or recording.addresses != _addresses(state):
                del recording  # frees memory that the new recording may need
                return self._record(inputs, state)
            self._recordings[shapes] = recording
            for own, x in zip(recording.inputs, inputs, strict=True):
                own.copy_(x)
            recording.graph.replay()
            return [result.clone() for result in recording.results]

    def _record(self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        while len(self._recordings) >= _MAX_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        before, generator_state = _copies(state), _generator_state(inputs[0].device)

        def restore() -> None:
            _restore(state, before)
            _set_generator_state(inputs[0].device, generator_state)

        try:
            recording, reason = self._record_and_check(inputs, state, restore)
        except RuntimeError as error:  # an operation that cannot be recorded, or out of memory
            recording, reason = None, str(error)
        if recording is None:
            warnings.warn(f"continuing without a CUDA graph, which is slower: {reason}", RuntimeWarning, stacklevel=3)
            self._plain = True
            self._recordings.clear()  # frees memory that the plain call may need
            restore()
            before.clear()
            return list(self._function(*inputs))
        self._recordings[tuple([x.shape for x in inputs])] = recording
        return [result.clone() for result in recording.results]

    def _record_and_check(
        self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], restore: Callable[[], None]
    ) -> tuple[_Recording | None, str]:
        """Record, replay once, and compare with a plain call; return the recording, or None and the reason."""
        stream = _stream(inputs[0].device)
        with _on_stream(stream):
            for _ in range(_WARM_UPS):
                restore()
                expected = _copies(self._function(*inputs))
            expected_state = _copies(state)
        own = [x.clone() for x in inputs]
        graph, results = _capture(self._function, own, stream)
        restore()
        for result, plain in zip(results, expected, strict=True):
            result.copy_(plain == 0)  # differs from the expected result everywhere, so an empty graph is detected
        graph.replay()
        if not _same([*results, *state], [*expected, *expected_state]):
            return None, "the replay and a plain call gave different results"
        return _Recording(graph, own, results, _addresses(state)), ""


# All calls of CUDA are below; tests without a device replace these functions by an emulation.


@contextmanager
def _device_guard(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device):
        yield


@cache  # one stream per device, because cuBLAS keeps 32 MiB of device memory for every stream
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


@contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on the stream: after all work queued before the block, and before all work queued after it."""
    outer_stream = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outer_stream)
    with torch.cuda.stream(stream):
        yield
    outer_stream.wait_stream(stream)


def _generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device)


def _set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state, device)


def _capture(
    function: _Function, inputs: Sequence[torch.Tensor], stream: torch.cuda.Stream
) -> tuple[_Graph, list[torch.Tensor]]:
    """Record a call of ``function`` without running it; return the graph and the tensors that a replay fills."""
    device = inputs[0].device
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    outer_stream = torch.cuda.current_stream(device)
    try:
        # "thread_local" lets other threads, such as one that loads images, use the device during the capture.
        with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = list(function(*inputs))
    except RuntimeError:
        torch.cuda.set_stream(outer_stream)  # torch (2.13) leaves the capture stream current if ending it fails
        # Before 2.12, torch leaves the memory pool of a failed capture open; later calls of empty_cache() then fail an
        # assertion (https://github.com/pytorch/pytorch/pull/180395).
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        raise
    return graph, results


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not inside the block, where freeing a CUDA graph would make the recording fail.

    torch did this itself until 2.8 (https://github.com/pytorch/pytorch/pull/161037).
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _addresses(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return detached copies; autograd nodes created on this stream would break a recording on another stream."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _restore(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Return whether all tensors are exactly equal; NaN equals NaN because a failed decode may contain it."""
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs)
