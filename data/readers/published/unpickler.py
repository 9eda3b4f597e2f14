"""Read the pickled batches of CIFAR without executing any code from them.

Before Python's unpickler reads a pickle, its opcodes are checked: only the opcodes for lists, dictionaries, text, small
integers and arrays of bytes are allowed, and their number is limited. Names are resolved only to the functions below.
Arrays are views of the file's content, so memory use is limited to a small multiple of the file's size.
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

_MAX_OPCODES = 4_000_000  # the largest file, of CIFAR-100, has about 400,000; each creates about 64 bytes of objects
_MAX_TUPLES = 10_000  # hashing deeply nested tuples overflows the C stack
_TUPLES = frozenset(["TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"])
_PUTS = frozenset(["BINPUT", "LONG_BINPUT"])
_OPCODES = _TUPLES | _PUTS | frozenset(
    ["PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"]
)  # fmt: skip


def load_batch(content: bytes, *, name: str) -> dict[str | bytes, Any]:
    r"""Return the dictionary of a batch, with keys and strings of the stored type (str or bytes).

    Callers must check the values, which can be anything that the allowed opcodes can create.

    Args:
        content: The pickle, protocol 2 to 4.
        name: The file's name in messages.

    Raises:
        SourceError: The pickle is damaged, refers to code, or is not a dictionary.

    Example:
        >>> load_batch(b"}X\x01\x00\x00\x00aK\x07s.", name="'batch'")
        {'a': 7}
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns about invalid escapes in names
            _check_opcodes(content, name)
        batch: dict[str | bytes, Any] = _Unpickler(content, name).load()
        return {key: value.pixels if isinstance(value, _Array) else value for key, value in batch.items()}
    except SourceError:
        raise
    except Exception as error:  # for damaged files, the unpickler and NumPy raise too many types to list
        raise SourceError(
            f"{name} is damaged or not a pickle ({type(error).__name__}: {error}). Download it again."
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
            raise SourceError(f"{name} has more than {_MAX_OPCODES:,} opcodes. Is it the wrong file?")


def _refusal(name: str, what: str) -> SourceError:
    # In ASCII, because names in hostile files may contain terminal control sequences.
    return SourceError(
        f"{name} contains code ({ascii(what)[1:-1][:200]}), which was not run. Published batches contain only arrays of "
        "bytes, lists and text. Delete this file and download the original."
    )


class _Unpickler(pickle.Unpickler):  # restricted, see the module docstring
    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(io.BytesIO(content), fix_imports=False, encoding="bytes")
        self._name = name
        self._spare_bytes = 2 * len(content)  # limit for the total size of encoded texts
        self._known = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _Function(self._dtype),
            ("_codecs", "encode"): _Function(self._encode),  # how Python 3 stores bytes in protocol 2
            ("__builtin__", "bytes"): _Function(lambda: b""),  # how it stores empty bytes
        }
        for core in ("numpy.core", "numpy._core"):  # before NumPy 2, and since
            self._known[f"{core}.multiarray", "_reconstruct"] = _Function(_reconstruct)

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a global name; raise SourceError for all but a few names."""
        known = self._known.get((module, name))
        if known is None:
            raise _refusal(self._name, f"{module}.{name}")
        return known

    def _dtype(self, code: str | bytes, *_: object) -> object:
        if code not in ("u1", b"u1"):
            raise SourceError(
                f"{self._name} contains an array of dtype {str(code)[:50]!r}, expected uint8. Is it the wrong file?"
            )
        return _UINT8

    def _encode(self, text: str, codec: str) -> bytes:
        self._spare_bytes -= len(text)
        if codec != "latin1" or self._spare_bytes < 0:
            raise _refusal(self._name, f"text encoded with {codec!r}, or encoded too often")
        return text.encode(codec)


class _Function:
    """A function that a pickle can call but not modify."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, _: object) -> None:
        raise TypeError("a function cannot have a state")


class _Uint8:
    """Stands for the dtype uint8. Its state, the byte order, is ignored."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


class _Array:
    """An array, whose content is set by its state."""

    __slots__ = ("pixels",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if dtype is not _UINT8 or not isinstance(data, bytes):
            raise TypeError("an array that does not consist of bytes")
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


_NDARRAY = object()
_UINT8 = _Uint8()


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _NDARRAY:
        raise TypeError("an array of another type")
    return _Array()
