"""Pack lists of integers into JSON as base64, which is faster to parse than a JSON list."""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import Sequence
from typing import Any

# NumPy's names of the types, and the type codes of `array`.
_TYPES = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_LARGEST = {name: 2 ** (8 * array(code).itemsize) - 1 for name, code in _TYPES.items()} | {
    "u8": 2**63 - 1
}


def pack(values: Sequence[int]) -> dict[str, str] | None:
    """Pack integers from 0 to 2^63 - 1, little-endian, in the narrowest type that holds them.

    Returns None if any value is something else.
    """
    if not all(type(value) is int and 0 <= value <= _LARGEST["u8"] for value in values):
        return None
    largest = max(values, default=0)
    dtype = next(name for name in _TYPES if largest <= _LARGEST[name])
    data = _little_endian(array(_TYPES[dtype], values)).tobytes()
    return {"dtype": dtype, "base64": base64.b64encode(data).decode("ascii")}


def is_packed(value: Any) -> bool:
    """Return whether a JSON value has the form of a result of `pack`."""
    return isinstance(value, dict) and value.keys() == {"dtype", "base64"}


def unpack(packed: dict[str, Any]) -> array[int]:
    """Return the packed integers. ValueError if `packed` is not a result of `pack`."""
    code = _TYPES.get(packed["dtype"]) if isinstance(packed["dtype"], str) else None
    if code is None:
        raise ValueError(f"integers of type {packed['dtype']!r} are not supported")
    try:
        data = base64.b64decode(packed["base64"], validate=True)
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"not base64 ({error})") from error
    values = array(code)
    values.frombytes(data)
    values = _little_endian(values)
    if code == "Q" and max(values, default=0) > _LARGEST["u8"]:
        raise ValueError(f"an integer is larger than {_LARGEST['u8']:,}")
    return values


def _little_endian(values: array[int]) -> array[int]:
    """Convert between the byte order of this machine and little-endian."""
    if sys.byteorder == "big":
        values.byteswap()
    return values
