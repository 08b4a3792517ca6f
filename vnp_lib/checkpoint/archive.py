"""Validate checkpoint archives before unpickling them."""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections import Counter
from typing import BinaryIO

from vnp_lib.checkpoint.array_pickle import ARRAY_GLOBALS, require_plain_arrays

# The operations in what torch.save writes of a checkpoint. A pickle of only these builds plain
# values and one tensor, in memory for a hundred times its size at most. torch itself would also
# accept `bytearray(10**11)`.
_OPCODES = re.compile(
    r"PROTO|STOP|MARK|GLOBAL|REDUCE|BINPERSID|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|"
    r"BINUNICODE|(LONG_)?BIN(PUT|GET)|EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?|APPENDS?|SETITEMS?"
)
# One more for a NumPy array.
_ARRAY_OPCODE = "BUILD"
_GLOBALS = re.compile(
    r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|"
    r"torch (Half|BFloat16|Float|Double|Int|Long)Storage"
)
_PROTOCOL = 2
# _rebuild_tensor_v2, and OrderedDict for its hooks.
_MAX_CALLS = 2
# _reconstruct, dtype, and encode for its bytes and for a character.
_MAX_CALLS_OF_ARRAY = 4
# A tuple that holds the previous tuple twice, and so on, takes exponential time to hash.
_MAX_TUPLES = 16


def check_archive(file: BinaryIO, size_bytes: int) -> bool:
    """Raise ValueError if torch.load could build more from an archive than the file holds.

    Returns:
        True if it holds a NumPy array.
    """
    _require_plain_directory(file, size_bytes)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a member of the archive is compressed")
        if sum(member.file_size for member in members) > size_bytes:
            raise ValueError("the members of the archive claim more than the file holds")
        names = {member.filename.casefold() for member in members}
        if len(names) < len(members):
            raise ValueError("two members of the archive have one name")
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("it is a program (TorchScript)")
        return _check_pickle(archive.read(members[0].filename.split("/")[0] + "/data.pkl"))


def _require_plain_directory(file: BinaryIO, size_bytes: int) -> None:
    """Check that the archive spans the whole file: torch and zipfile then see the same members."""
    file.seek(max(0, size_bytes - 98))
    tail = file.read().rjust(98, b"\0")
    directory64, locator, end = tail[:56], tail[56:76], tail[76:]
    if end[:4] != b"PK\5\6":
        raise ValueError("it is no zip archive, or is followed by other bytes")
    length, start, stop = *struct.unpack("<II", end[12:20]), size_bytes - len(end)
    if locator[:4] == b"PK\6\7":
        length, start, stop = *struct.unpack("<QQ", directory64[40:]), size_bytes - len(tail)
        if directory64[:4] != b"PK\6\6" or struct.unpack("<Q", locator[8:16])[0] != stop:
            raise ValueError("the directory of the archive is not where it says")
    if start + length != stop:
        raise ValueError("the directory of the archive is not where it says")


def _check_pickle(data: bytes) -> bool:
    """Raise ValueError if a pickle does more than that of a checkpoint.

    Returns:
        True if it holds a NumPy array.
    """
    counts: Counter[str] = Counter()
    holds_array = False
    for opcode, argument, _ in pickletools.genops(data):
        counts[opcode.name] += 1
        if opcode.name == "PROTO" and argument != _PROTOCOL:
            raise ValueError(
                f"its pickle has protocol {argument}, and torch.load(weights_only=True) reads "
                f"{_PROTOCOL}, which is torch.save's own: save it again without pickle_protocol"
            )
        if not _OPCODES.fullmatch(opcode.name) and opcode.name != _ARRAY_OPCODE:
            raise ValueError(
                f"its pickle has the operation {opcode.name}, which no checkpoint needs"
            )
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            if not ARRAY_GLOBALS.fullmatch(str(argument)):
                raise ValueError(
                    f"its pickle names {str(argument)[:100]!r}, which no checkpoint needs"
                )
            holds_array = True
    if counts[_ARRAY_OPCODE] and not holds_array:
        raise ValueError(f"its pickle has the operation {_ARRAY_OPCODE}, which no checkpoint needs")
    num_tuples = sum(counts[name] for name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"))
    most_calls = _MAX_CALLS_OF_ARRAY if holds_array else _MAX_CALLS
    if counts["REDUCE"] > most_calls or counts["BINPERSID"] > 1 or num_tuples > _MAX_TUPLES:
        raise ValueError("its pickle builds more than one tensor and plain values")
    if holds_array:
        require_plain_arrays(data)
    return holds_array
