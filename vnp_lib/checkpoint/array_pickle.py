"""Validate pickles of NumPy arrays before anything is built from them."""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch

# What pickles arrays, by its names in NumPy 1 and 2, and how protocol 2 writes bytes.
ARRAY_GLOBALS = re.compile(
    r"numpy\.(_core|core)\.multiarray _reconstruct|numpy ndarray|numpy dtype|_codecs encode"
)

_DTYPES = {name: np.dtype(name) for name in ("f2", "f4", "f8", "i4", "i8")}
# NumPy's types lack it.
_RECONSTRUCT = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    _RECONSTRUCT,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(dtype) for dtype in _DTYPES.values()),
]
# torch has one list of safe globals per process.
_SAFE_GLOBALS_LOCK = Lock()


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Bytes:
    size: int


@dataclass(frozen=True, slots=True)
class _Dtype:
    itemsize: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array without content yet."""


_MARK = object()
# A list, a dictionary or a tensor: nothing is called with it.
_OTHER = object()


@contextmanager
def arrays_allowed() -> Iterator[None]:
    """Let torch.load(weights_only=True) build NumPy arrays of numbers too, within the block."""
    with _SAFE_GLOBALS_LOCK, torch.serialization.safe_globals(_SAFE_GLOBALS):
        yield


def require_plain_arrays(data: bytes) -> None:
    """Validate a pickle of protocol 2 without building anything.

    The operations and globals in it must be among those of a checkpoint. Each call has to be one of
    the four that build an array, with arguments that claim no more than the bytes in the pickle.

    Raises:
        ValueError: It builds something else; the message says what.
    """
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            reader.execute(opcode.name, argument)
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle takes what is not there") from error


class _Reader:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL":
                stack.append(_Global(argument))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append(_OTHER)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._pop(int(name[-1])))
            case "TUPLE":
                stack.append(self._pop_to_mark())
            case "APPEND":
                self._pop(1)
            case "SETITEM":
                self._pop(2)
            case "APPENDS" | "SETITEMS":
                self._pop_to_mark()
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINPERSID":
                self._pop(1)
                stack.append(_OTHER)
            case "REDUCE":
                function, arguments = self._pop(2)
                stack.append(_result_of(function, arguments))
            case "BUILD":
                (state,) = self._pop(1)
                _require_state(stack[-1], state)

    def _pop(self, count: int) -> tuple[Any, ...]:
        if len(self._stack) < count:
            raise IndexError
        taken = tuple(self._stack[-count:])
        del self._stack[-count:]
        return taken

    def _pop_to_mark(self) -> tuple[Any, ...]:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise IndexError
        taken = tuple(self._stack[start + 1 :])
        del self._stack[start:]
        return taken


def _result_of(function: Any, arguments: Any) -> Any:
    name = function.name if isinstance(function, _Global) else ""
    match (name.replace("numpy.core.", "numpy._core."), arguments):
        case ("_codecs encode", (str(text), "latin1")):
            return _Bytes(len(text))
        case ("numpy._core.multiarray _reconstruct", (_Global("numpy ndarray"), (0,), _Bytes(1))):
            return _Array()
        case ("numpy dtype", (str(code), False, True)) if code in _DTYPES:
            return _Dtype(_DTYPES[code].itemsize)
        case ("numpy dtype", (code, *_)):
            raise ValueError(
                f"it holds a NumPy array of {str(code)[:20]!r}; "
                f"arrays of {', '.join(_DTYPES)} are read"
            )
        case ("torch._utils _rebuild_tensor_v2", _) | ("collections OrderedDict", ()):
            return _OTHER
    raise ValueError(f"its pickle calls {name[:100]!r} with what no checkpoint needs")


def _require_state(built: Any, state: Any) -> None:
    match (built, state):
        case (_Dtype(), (3, "<" | ">" | "=" | "|", None, None, None, -1, -1, 0)):
            return
        case (_Array(), (1, tuple(shape), _Dtype(itemsize), bool(), _Bytes(size))):
            if not all(type(length) is int and length >= 0 for length in shape):
                raise ValueError("its pickle gives a NumPy array a shape that is none")
            if math.prod(shape) * itemsize == size:
                return
    raise ValueError("its pickle gives a NumPy array a content that does not fit it")
