"""CUDA graphs without CUDA: record the operators of a call on the CPU, and replay them on the same memory.

This replaces the CUDA functions that ``data/loaders/cuda_graph.py`` uses, so that code built on it can be tested on any
machine.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsmix.data.loaders import cuda_graph

__all__ = ["Recorder", "emulate_cuda_graphs"]

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default}


class _Graph(TorchDispatchMode):
    """The recorded operators of a call, with the memory that they read and write."""

    def __init__(self, recorder: "Recorder") -> None:
        super().__init__()
        self._recorder = recorder
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self._recorder.replays += 1
        if self._recorder.fault == "empty":
            return
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class Recorder:
    """Counts recordings and replays, and injects faults."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.fault: Literal["", "refused", "empty", "no memory"] = ""

    def capture(
        self, function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], stream: None
    ) -> tuple[_Graph, list[torch.Tensor]]:
        """Record a call; return its graph and outputs."""
        self.captures += 1
        if self.fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.fault == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")
        graph = _Graph(self)
        with graph:
            return graph, list(function(*inputs))


@contextlib.contextmanager
def emulate_cuda_graphs() -> Iterator[Recorder]:
    """Make work on the CPU inside the block be recorded like work on CUDA."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "_RECORDED_ON", frozenset({"cpu", "cuda"}))
        patch.setattr(cuda_graph, "_device_guard", lambda device: contextlib.nullcontext())
        patch.setattr(cuda_graph, "_stream", lambda device: None)
        patch.setattr(cuda_graph, "_on_stream", lambda stream: contextlib.nullcontext())
        patch.setattr(cuda_graph, "_capture", recorder.capture)
        patch.setattr(cuda_graph, "_generator_state", lambda device: torch.get_rng_state())
        patch.setattr(cuda_graph, "_set_generator_state", lambda device, state: torch.set_rng_state(state))
        yield recorder
