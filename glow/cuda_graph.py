"""Replaying work on a CUDA device as one recorded graph, instead of launching its thousands of small kernels each time.

The one rule: a recording is only trusted after its first replay gave, bit for bit, what the plain call gave; where CUDA
cannot record it, or the bits differ, the plain call stays in use, with a warning.
"""

import warnings
from collections.abc import Callable, Sequence

import torch

__all__ = ["Replayed"]

_WARM_UPS = 2  # plain calls on the recording stream, so that libraries make their handles and workspaces before


class Replayed:
    """A function from one tensor of a fixed shape to tensors, recorded at its first call.

    The function must not wait for the device, and must read whatever else it needs from the same memory each time.
    Results are copies, which the next call leaves alone.

    Args:
        function: what to record; it may leave other results in ``outputs``.
        outputs: returns further tensors that the function fills, such as gradients; they belong to the recording, so the
            next call writes over them.

    On the CPU it just calls.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        outputs: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> None:
        self._function = function
        self._outputs = outputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: torch.Tensor | None = None
        self._results: Sequence[torch.Tensor] = ()
        self._plain = False

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what the function returns for x."""
        if self._plain or x.device.type != "cuda":
            return list(self._function(x))
        if self._graph is None or self._input is None or self._input.shape != x.shape:
            return self._record(x)
        self._input.copy_(x)
        self._graph.replay()
        return [result.clone() for result in self._results]

    def _record(self, x: torch.Tensor) -> list[torch.Tensor]:
        stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                expected = [result.clone() for result in self._function(x)]
                expected += [output.clone() for output in self._outputs()]
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph, own, why = torch.cuda.CUDAGraph(), x.clone(), ""
        results: list[torch.Tensor] = []
        try:
            with torch.cuda.graph(graph):
                results = list(self._function(own))
            graph.replay()
            if not _same([*results, *self._outputs()], expected):
                why = "its replay gave other numbers than the plain call"
        except RuntimeError as error:
            why = str(error)
        if why:
            warnings.warn(f"this work runs without a CUDA graph, and slower: {why}", RuntimeWarning, stacklevel=3)
            self._plain = True
            del graph, own, results, expected  # the plain call may want their memory
            return list(self._function(x))
        self._graph, self._input, self._results = graph, own, results
        return [result.clone() for result in results]


def _same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Tell whether tensors are equal, bit for bit; a corrupted image may hold infinities and NaN."""
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs)
