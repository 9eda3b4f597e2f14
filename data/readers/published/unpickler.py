"""The pickled batches of CIFAR, read without running anything.

Before Python's unpickler sees a pickle, its opcodes are checked: only those that lists, dictionaries, text, small integers
and arrays of bytes consist of, each whole, not too many. A name stands for one of the functions below, or is refused.
Arrays are views of the file's content, so memory stays within a small multiple of the file.
"""

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from lsmix.data.errors import SourceError

__all__ = ["load_batch"]

_MAX_OPCODES = 4_000_000  # CIFAR-100, the largest, has some 400,000; each makes 64 bytes of objects or so
_MAX_TUPLES = 10_000  # hashing a tuple in a tuple in a tuple … takes the C stack
_TUPLES = frozenset(["TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"])
_PUTS = frozenset(["BINPUT", "LONG_BINPUT"])
_OPCODES = _TUPLES | _PUTS | frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"]
)  # fmt: skip


def load_batch(content: bytes, *, name: str) -> dict[str | bytes, Any]:
    r"""Return the dictionary of a batch, with keys and strings as they were written (str or bytes).

    Its values may be anything that the opcodes can make, so the reader of a batch checks those that it uses.

    Args:
        content: the pickle, of protocol 2 to 4.
        name: what to call it in messages.

    Raises:
        SourceError: the pickle is damaged, names anything that could be run, or is no dictionary.

    Example:
        >>> load_batch(b"}X\x01\x00\x00\x00aK\x07s.", name="'batch'")
        {'a': 7}
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of odd escapes in a name
            _check_opcodes(content, name)
        batch: dict[str | bytes, Any] = _Unpickler(content, name).load()
        return {key: value.pixels if isinstance(value, _Array) else value for key, value in batch.items()}
    except SourceError:
        raise
    except Exception as error:  # the unpickler and NumPy raise more kinds than can be listed, on damaged files
        raise SourceError(
            f"{name} is damaged or no pickle ({type(error).__name__}: {error}). Fetch it again."
        ) from error


def _check_opcodes(content: bytes, name: str) -> None:
    tuples = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        tuples += opcode.name in _TUPLES
        if opcode.name not in _OPCODES:
            raise _refusal(name, f"{opcode.name} {argument}" if isinstance(argument, str) else opcode.name)
        if (
            count >= _MAX_OPCODES
            or tuples > _MAX_TUPLES
            or (opcode.name in _PUTS and int(argument or 0) > _MAX_OPCODES)
        ):
            raise SourceError(f"{name} goes on past {_MAX_OPCODES} opcodes; no published batch does. Wrong file?")


def _refusal(name: str, what: str) -> SourceError:
    # As ASCII, since a name in a hostile file may hold control sequences for the terminal.
    return SourceError(
        f"{name} contains code ({ascii(what)[1:-1][:200]}); it was not run. A published batch holds only arrays of bytes, lists "
        "and text: do not use this file, fetch the original."
    )


class _Unpickler(pickle.Unpickler):  # restricted as the module says
    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="bytes")
        self._name = name
        self._spare_bytes = 2 * len(content)  # that texts may be turned into
        self._known = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _Function(self._dtype),
            ("_codecs", "encode"): _Function(self._encode),  # how Python 3 writes bytes for protocol 2
            ("__builtin__", "bytes"): _Function(lambda: b""),  # how it writes empty ones
        }
        for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            self._known[f"{core}.multiarray", "_reconstruct"] = _Function(_reconstruct)

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few things that a batch names."""
        known = self._known.get((module, name))
        if known is None:
            raise _refusal(self._name, f"{module}.{name}")
        return known

    def _dtype(self, code: str | bytes, *_: object) -> object:
        if code not in ("u1", b"u1"):
            raise SourceError(
                f"{self._name} holds an array of dtype {str(code)[:50]!r}; only uint8 is read, never objects. Wrong file?"
            )
        return _UINT8

    def _encode(self, text: str, codec: str) -> bytes:
        self._spare_bytes -= len(text)
        if codec != "latin1" or self._spare_bytes < 0:
            raise _refusal(self._name, f"a text to be encoded by {codec!r}, or again and again")
        return text.encode(codec)


class _Function:
    """A function that a pickle may call, and cannot alter."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, _: object) -> None:
        raise TypeError("a state for a function")


class _Uint8:
    """Stands for the dtype of bytes, whose state is its byte order."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


class _Array:
    """An array that gets its content as a state."""

    __slots__ = ("pixels",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype is not _UINT8 or not isinstance(data, bytes):
            raise TypeError("an array of what are no bytes")
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


_NDARRAY = object()
_UINT8 = _Uint8()


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _NDARRAY:
        raise TypeError("an array of another type")
    return _Array()
