"""Replaying work on a CUDA device as one recorded graph, instead of launching thousands of small kernels each time.

A recording is used only if its first replay gives the same bits as the plain call. If CUDA cannot record the work, or the
bits differ, the plain call is used, with a warning.
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

_WARM_UPS = 2  # plain calls on the recording stream, so that libraries make their handles and workspaces before
_RECORDED_ON = frozenset({"cuda"})  # types of devices
_MAX_RECORDINGS = 4  # shapes kept by one ``Replayed``; each holds the memory of a whole call
_Function = Callable[..., Sequence[torch.Tensor]]


class _Graph(Protocol):
    def replay(self) -> None: ...


class _Recording(NamedTuple):
    graph: _Graph
    inputs: list[torch.Tensor]
    results: list[torch.Tensor]
    addresses: tuple[int, ...]  # of the state, which the graph reads and writes there


def can_record(device: torch.device) -> bool:
    """Tell whether work on this device can be recorded."""
    return device.type in _RECORDED_ON


class Replayed:
    """A function from tensors to tensors, recorded at its first call with their shapes and replayed from then on.

    The function must not wait for the device, and must read everything else from the same memory each time. It may draw
    from the device's global generator: a replay draws what a plain call would.
    Results are copies, which the next call leaves alone. At most four combinations of shapes are kept, those used last.

    Args:
        function: what to record.
        state: returns the tensors that the function also reads and that may move, or writes, such as parameters. Where
            one of them has moved since the recording, the function is recorded again.

    On the CPU it just calls.
    """

    def __init__(self, function: _Function, state: Callable[[], Sequence[torch.Tensor]] = tuple) -> None:
        self._function = function
        self._state = state
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}  # the one used last is at the end
        self._plain = False

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return what the function returns for the inputs, which are on one device."""
        if self._plain or not can_record(inputs[0].device):
            return list(self._function(*inputs))
        with _device_guard(inputs[0].device):
            state, shapes = self._state(), tuple([x.shape for x in inputs])
            recording = self._recordings.pop(shapes, None)
            if recording is None or recording.addresses != _addresses(state):
                del recording  # it may hold the memory that its successor needs
                return self._record(inputs, state)
            self._recordings[shapes] = recording
            for own, x in zip(recording.inputs, inputs, strict=True):
                own.copy_(x)
            recording.graph.replay()
            return [result.clone() for result in recording.results]

    def _record(self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        while len(self._recordings) >= _MAX_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        before, numbers = _copies(state), _generator_state(inputs[0].device)

        def restore() -> None:
            _restore(state, before)
            _set_generator_state(inputs[0].device, numbers)

        try:
            recording, why = self._checked(inputs, state, restore)
        except RuntimeError as error:  # what cannot be recorded, and memory that ran out
            recording, why = None, str(error)
        if recording is None:
            warnings.warn(f"this work runs without a CUDA graph, and slower: {why}", RuntimeWarning, stacklevel=3)
            self._plain = True
            self._recordings.clear()  # the plain call may want their memory
            restore()
            before.clear()
            return list(self._function(*inputs))
        self._recordings[tuple([x.shape for x in inputs])] = recording
        return [result.clone() for result in recording.results]

    def _checked(
        self, inputs: Sequence[torch.Tensor], state: Sequence[torch.Tensor], restore: Callable[[], None]
    ) -> tuple[_Recording | None, str]:
        """Record, replay once, and compare with a plain call: the recording, or why there is none."""
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
            result.copy_(plain == 0)  # differs from what is expected everywhere: a graph that does nothing is found
        graph.replay()
        if not _same([*results, *state], [*expected, *expected_state]):
            return None, "its replay gave other numbers than the plain call"
        return _Recording(graph, own, results, _addresses(state)), ""


# All that touches CUDA; tests without a device put an emulation in its place.


@contextmanager
def _device_guard(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device):
        yield


@cache  # of one device the same each time: for every stream cuBLAS keeps 32 MiB of its memory
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped


@contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on the stream, behind all work before it and before all work after it."""
    around = torch.cuda.current_stream(stream.device)
    stream.wait_stream(around)
    with torch.cuda.stream(stream):
        yield
    around.wait_stream(stream)


def _generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device)


def _set_generator_state(device: torch.device, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state, device)


def _capture(
    function: _Function, inputs: Sequence[torch.Tensor], stream: torch.cuda.Stream
) -> tuple[_Graph, list[torch.Tensor]]:
    """Record a call of ``function``, without running it; return the graph, and the tensors that it will fill."""
    device = inputs[0].device
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    around = torch.cuda.current_stream(device)
    try:
        # Other threads, such as one that loads images, may use the device meanwhile.
        with _no_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = list(function(*inputs))
    except RuntimeError:
        torch.cuda.set_stream(around)  # torch (2.13) leaves the capture's own one current where its end fails
        # Before 2.12 torch leaves the pool of a failed capture open, and each later empty_cache() fails an assertion
        # (https://github.com/pytorch/pytorch/pull/180395).
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        raise
    return graph, results


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not inside the block, where a CUDA graph among it would make the recording fail.

    torch did so itself until 2.8 (https://github.com/pytorch/pytorch/pull/161037).
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
    """Return copies without autograd's graph: that would keep nodes of this stream, which break a recording on another."""
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _restore(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Tell whether tensors are equal, bit for bit; a failed decode may hold infinities and NaN."""
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs)
