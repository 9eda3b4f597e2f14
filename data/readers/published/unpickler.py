"""Reading the pickles that CIFAR is published in, without ever running what a pickle says.

Python's own unpickler is not used. A small machine of ours walks the opcodes and knows only plain
containers, text, bytes, numbers and numeric NumPy arrays; whatever else a pickle asks for is named and refused.
Memory stays within a small multiple of the file: opcodes are counted, and arrays cannot hold more than twice what the file does.
"""

import enum
import itertools
import math
import pickletools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import MissingError, SourceError

__all__ = ["load_batch"]

_MAX_BYTES = 1 << 30  # a published batch has 31 MB (CIFAR-10) or 156 MB (CIFAR-100)
_MAX_OPCODES = 4_000_000  # CIFAR-100, the largest, has some 400,000; each makes 64 bytes of objects or so
_SMALL_BYTES = 1 << 16
_NUMERIC = re.compile(r"b1|[iu][1248]|f[248]")

# Opcodes whose argument is the value; in the old ones it is bytes that pickletools shows as Latin-1 text.
_LITERALS = (
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_OLD_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_IGNORED = {"PROTO", "FRAME"}


class _Known(enum.Enum):
    """What a pickle may name. These are bare tokens: nothing in them can be called or altered."""

    RECONSTRUCT = enum.auto()  # an empty array, to be filled by BUILD
    FROM_BUFFER = enum.auto()  # an array of bytes at hand
    SCALAR = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    ENCODE = enum.auto()  # how Python 3 writes bytes for protocol 2
    BYTES = enum.auto()  # how it writes empty ones


_GLOBALS = {
    ("numpy", "ndarray"): _Known.NDARRAY,
    ("numpy", "dtype"): _Known.DTYPE,
    ("_codecs", "encode"): _Known.ENCODE,
    ("__builtin__", "bytes"): _Known.BYTES,
    ("builtins", "bytes"): _Known.BYTES,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Known.RECONSTRUCT
    _GLOBALS[f"{_core}.multiarray", "scalar"] = _Known.SCALAR
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Known.FROM_BUFFER


class _Dtype:
    """A numeric dtype in the making: BUILD adds the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="

    def finished(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


def load_batch(source: bytes | Path, *, name: str = "") -> dict[str | bytes, Any]:
    r"""Return the dictionary that a pickle holds, with keys and strings as they were written (str or bytes).

    Args:
        source: the pickle itself, or the path of its file.
        name: what to call it in messages; the path where there is one.

    Raises:
        MissingError: there is no such file.
        SourceError: the pickle is damaged, names anything that could be run, or is no dictionary.

    Example:
        >>> load_batch(b"}X\x01\x00\x00\x00aK\x07s.")
        {'a': 7}
    """
    if isinstance(source, Path):
        name = name or repr(str(source))
        if not source.is_file():
            raise MissingError(f"no pickle at {str(source)!r}: there is no such file.")
        _check_size(source.stat().st_size, name)
        source = source.read_bytes()
    name = name or "a pickle"
    _check_size(len(source), name)
    result = _Machine(source, name).run()
    if not isinstance(result, dict):
        raise SourceError(f"{name} holds a {type(result).__name__}, expected a dictionary. Wrong file?")
    _check_plain(result, name)
    return result


def _check_plain(result: dict[str | bytes, Any], name: str) -> None:
    """Refuse values that are not numbers, text, arrays or plain containers."""
    waiting: list[Any] = [result]
    seen = {id(result)}
    while waiting:
        value = waiting.pop()
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, _Known | _Dtype):
                raise SourceError(f"{name} contains code (a name that stands for itself); it was not run. Wrong file?")
            if isinstance(part, dict | list | tuple) and id(part) not in seen:
                seen.add(id(part))  # a list may hold itself
                waiting.append(part)


def _check_size(size: int, name: str) -> None:
    if size > _MAX_BYTES:
        raise SourceError(f"{name} has {size} bytes; no published batch has more than {_MAX_BYTES}. Wrong file?")


class _Machine:
    """Walks the opcodes of one pickle."""

    def __init__(self, content: bytes, name: str) -> None:
        self._content = content
        self._name = name
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each open mark
        self._memo: dict[int, Any] = {}
        self._unfilled: dict[int, npt.NDArray[Any]] = {}  # arrays that wait for their BUILD, by id
        # What arrays and re-encoded bytes may still take: Python 3 writes an array for protocol 2 such that it takes both.
        self._spare_bytes = 2 * len(content) + _SMALL_BYTES
        self._actions = self._action_table()

    def run(self) -> Any:
        """Return the value that the pickle leaves."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pickletools warns of odd escapes in a name
                return self._walk()
        except SourceError:
            raise
        except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise SourceError(
                f"{self._name} is damaged or no pickle ({type(error).__name__}: {error}). Fetch it again."
            ) from error

    def _walk(self) -> Any:
        for opcode, argument, _ in itertools.islice(pickletools.genops(self._content), _MAX_OPCODES):
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise SourceError(f"{self._name} goes on past {_MAX_OPCODES} opcodes; no published batch does. Wrong file?")

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _OLD_STRINGS:
            self._stack.append(argument.encode("latin-1"))
        elif opcode in self._actions:
            self._actions[opcode](argument)
        elif opcode not in _IGNORED:
            raise self._refusal(f"{opcode} {argument}" if isinstance(argument, str) else opcode)

    def _action_table(self) -> dict[str, Callable[[Any], None]]:
        push = self._stack_push
        table: dict[str, Callable[[Any], None]] = {
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_TUPLE": lambda _: push(()),
            "MARK": self._mark,
            "TUPLE": lambda _: push(tuple(self._to_mark())),
            "TUPLE1": lambda _: push(self._last(1)),
            "TUPLE2": lambda _: push(self._last(2)),
            "TUPLE3": lambda _: push(self._last(3)),
            "LIST": lambda _: push(self._to_mark()),
            "DICT": lambda _: self._set_items({}, self._to_mark(), push=True),
            "APPEND": lambda _: self._extend(list(self._last(1))),
            "APPENDS": lambda _: self._extend(self._to_mark()),
            "SETITEM": lambda _: self._set_items(None, list(self._last(2))),
            "SETITEMS": lambda _: self._set_items(None, self._to_mark()),
            "MEMOIZE": lambda _: self._remember(len(self._memo)),
            "DUP": lambda _: push(self._stack[-1]),
            "POP": lambda _: self._drop(),
            "POP_MARK": self._drop_to_mark,
            "GLOBAL": lambda named: push(self._known(*named.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(self._known(*self._last(2))),
            "REDUCE": lambda _: push(self._reduce(*self._last(2))),
            "BUILD": lambda _: self._build(self._pop()),
        }
        table.update(dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._remember))
        table.update(dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda index: push(self._memo[index])))
        return table

    # The stack.

    def _stack_push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        return self._stack.pop()

    def _last(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise IndexError("stack underflow")
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below.pop()
        return values

    def _drop_to_mark(self, _: Any) -> None:
        self._to_mark()

    def _drop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # Containers.

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("items are appended to what is no list")
        target.extend(values)

    def _set_items(self, target: Any, flat: list[Any], *, push: bool = False) -> None:
        target = self._stack[-1] if target is None else target
        if not isinstance(target, dict) or len(flat) % 2:
            raise TypeError("items are set on what is no dictionary")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Only these: hashing a deeply nested tuple overflows the C stack, and integers can be made to collide.
            if not isinstance(key, str | bytes):
                raise TypeError(f"a dictionary's key is a {type(key).__name__}, expected text")
            target[key] = value
        if push:
            self._stack.append(target)

    # What a pickle names, and the few things that it may have made.

    def _refusal(self, what: str) -> SourceError:
        # As ASCII, since a name in a hostile file may hold control sequences for the terminal.
        return SourceError(
            f"{self._name} contains code ({ascii(what)[1:-1][:200]}); it was not run. A published batch holds only arrays, lists and "
            "text: do not use this file, fetch the original."
        )

    def _known(self, module: Any, name: Any) -> _Known:
        known = _GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise self._refusal(f"{module}.{name}")
        return known

    def _reduce(self, known: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise TypeError("a call's arguments are no tuple")
        match known, arguments:
            case _Known.DTYPE, (code, *_):
                return _Dtype(self._numeric(code))
            case _Known.RECONSTRUCT, (_Known.NDARRAY, (0,), b"b" | "b"):
                array = np.empty(0, np.uint8)
                self._unfilled[id(array)] = array
                return array
            case _Known.FROM_BUFFER, (
                bytes() | bytearray() as data,
                _Dtype() as dtype,
                tuple() as shape,
                "C" | "F" as order,
            ):
                array = np.empty(0, np.uint8)
                self._fill(array, shape, dtype, order == "F", data)
                return array
            case _Known.SCALAR, (_Dtype() as dtype, bytes() as data):
                return self._scalar(dtype, data)
            case _Known.ENCODE, (str() as text, "latin1" | "latin-1"):
                self._spend(len(text))
                return text.encode("latin-1")
            case _Known.BYTES, ():
                return b""
        raise self._refusal(f"a call of {known.name.lower() if isinstance(known, _Known) else type(known).__name__}")

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        match target, state:
            case _Dtype(), (_, "<" | ">" | "|" | "=" | b"<" | b">" | b"|" | b"=" as order, None, None, None, *_):
                target.order = order if isinstance(order, str) else order.decode()
            case np.ndarray(), (_, tuple() as shape, _Dtype() as dtype, bool() | int() as fortran, bytes() as data):
                if self._unfilled.pop(id(target), None) is None:
                    raise TypeError("an array is filled twice")
                self._fill(target, shape, dtype, bool(fortran), data)
            case _:
                raise self._refusal(f"a state for a {type(target).__name__}")

    def _numeric(self, code: Any) -> str:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not _NUMERIC.fullmatch(text):
            raise SourceError(
                f"{self._name} holds an array of dtype {str(text)[:50]!r}; only plain numbers are read, never objects. "
                "Do not use this file, fetch the original."
            )
        return text

    def _fill(
        self, array: npt.NDArray[Any], shape: tuple[Any, ...], dtype: _Dtype, fortran: bool, data: bytes | bytearray
    ) -> None:
        """Give an empty array its content, once its size has been checked."""
        finished = dtype.finished()
        if len(shape) > 32 or not all(type(length) is int and 0 <= length < 1 << 40 for length in shape):
            raise TypeError("an array's shape is no tuple of lengths")
        if math.prod(shape) * finished.itemsize != len(data):
            raise SourceError(
                f"{self._name} is damaged: an array of shape {shape} and dtype {finished} needs "
                f"{math.prod(shape) * finished.itemsize} bytes, got {len(data)}. Fetch it again."
            )
        self._spend(len(data))
        array.__setstate__((1, shape, finished, fortran, bytes(data)))  # type: ignore[arg-type]  # a bool will do

    def _scalar(self, dtype: _Dtype, data: bytes) -> bool | int | float:
        finished = dtype.finished()
        if len(data) != finished.itemsize:
            raise TypeError(f"a number of {finished.itemsize} bytes has {len(data)}")
        value: bool | int | float = np.frombuffer(data, finished)[0].item()
        return value

    def _spend(self, count: int) -> None:
        self._spare_bytes -= count
        if self._spare_bytes < 0:
            raise SourceError(
                f"{self._name} would unpack to more than twice its {len(self._content)} bytes, as no published batch does. "
                "Do not use this file, fetch the original."
            )
