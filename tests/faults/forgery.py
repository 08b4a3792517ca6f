"""Forged checkpoints, by an attacker who can write to the run directory and knows torch."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

_PROTOCOL_2 = b"\x80\x02"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
_NO_HOOKS = b"ccollections\nOrderedDict\n)R"


class Forgery(NamedTuple):
    """A file that must be refused."""

    name: str
    data: bytes


def forgeries(canary: Path) -> Iterator[Forgery]:
    """Everything below. Whatever runs code makes `canary`."""
    command = f"touch {canary}"
    for how, pickled in _programs(command):
        yield Forgery(f"{how}, as a zip archive", archive(pickled))
        yield Forgery(f"{how}, in torch's legacy format", _legacy(pickled))
        yield Forgery(f"{how}, as a bare pickle", pickled)
    yield from _polyglots(command)
    yield from _torchscript(command)
    yield from _bombs()
    yield from _false_claims()
    yield from _foreign_objects()


def archive(
    pickled: bytes,
    storages: tuple[bytes, ...] = (bytes(64),),
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A zip archive as torch.save makes it."""
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{number}": storage for number, storage in enumerate(storages)}
    return _zip(members, compression)


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    storage: str = "0",
    offset: int = 0,
    numel: int = 16,
    kind: str = "FloatStorage",
) -> bytes:
    """The operations that build a tensor of any claim."""
    persistent_id = (
        b"("
        + _text("storage")
        + f"ctorch\n{kind}\n".encode()
        + _text(storage)
        + _text("cpu")
        + _int(numel)
        + b"tQ"
    )
    return (
        _TENSOR
        + b"("
        + persistent_id
        + _int(offset)
        + _ints(shape)
        + _ints(strides)
        + b"\x89"
        + _NO_HOOKS
        + b"tR"
    )


def content(embeddings: bytes, sequence_ids: bytes = b"]", metadata: bytes = b"}") -> bytes:
    """The pickle of a checkpoint, from the operations that build its values."""
    pairs = (
        _text("embeddings"),
        embeddings,
        _text("sequence_ids"),
        sequence_ids,
        _text("metadata"),
        metadata,
    )
    return _PROTOCOL_2 + b"}(" + b"".join(pairs) + b"u."


def good_content() -> bytes:
    """A checkpoint of one row that is right."""
    return content(tensor((1, 4), (4, 1)), b"]" + _text("a") + b"a")


def _programs(command: str) -> Iterator[tuple[str, bytes]]:
    """Pickles that run a command when a careless unpickler reads them."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield (
            f"reduce to os.system, protocol {protocol}",
            pickle.dumps(_Reduced(os.system, command), protocol),
        )
        yield (
            f"reduce within a checkpoint, protocol {protocol}",
            pickle.dumps(_checkpoint_with(command), protocol),
        )
    text = _text(command)
    yield "reduce to exec", pickle.dumps(_Reduced(exec, f"__import__('os').system({command!r})"), 2)
    yield "inst", b"(S" + repr(command).encode() + b"\nios\nsystem\n."
    yield "obj", b"(cos\nsystem\n" + text + b"o."
    yield "stack global", b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R."
    yield "newobj", _PROTOCOL_2 + b"csubprocess\nPopen\n" + text + b"\x85\x81."
    yield (
        "newobj_ex",
        b"\x80\x04csubprocess\nPopen\n(" + text + b"t}" + _text("shell") + b"\x88s\x92.",
    )
    yield (
        "build of a class",
        _PROTOCOL_2
        + b"ctypes\nSimpleNamespace\n)R}"
        + _text("__setstate__")
        + b"cos\nsystem\nsb"
        + text
        + b"b.",
    )
    yield "build of a tensor", _PROTOCOL_2 + b"ctorch\nTensor\n)\x81(" + text + b"tb."
    yield "extension registry", _PROTOCOL_2 + b"\x82\x01" + text + b"\x85R."
    yield (
        "load from bytes",
        pickle.dumps(_Reduced(torch.storage._load_from_bytes, _pickled(command)), 2),
    )
    yield "nested pickle", pickle.dumps(_Reduced(pickle.loads, _pickled(command)), 2)
    yield (
        "numpy reconstruct",
        pickle.dumps(np.array([_Reduced(os.system, command)], dtype=object), 2),
    )
    yield (
        "getattr of an allowed module",
        _PROTOCOL_2 + b"ctorch.serialization\nos.system\n" + text + b"\x85R.",
    )
    yield (
        "apply over a list",
        _PROTOCOL_2 + b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n]" + text + b"atRtR.",
    )


def _polyglots(command: str) -> Iterator[Forgery]:
    """Files that are one thing to zipfile and another to torch."""
    good, bad = archive(good_content()), archive(_pickled(command))
    yield Forgery("a program before an archive", _legacy(_pickled(command)) + good)
    yield Forgery("an archive before an archive", bad + good)
    yield Forgery("an archive with a comment", good[:-2] + struct.pack("<H", 4) + b"note")
    yield Forgery("an archive with bytes after it", good + b"\0")
    yield Forgery("two directories, zipfile's and torch's", _two_directories())
    yield Forgery("a member twice", _zip_with_twins(good_content(), _pickled(command)))
    yield Forgery(
        "a member in upper case", _zip_with_twins(good_content(), _pickled(command), "DATA.PKL")
    )


def _torchscript(command: str) -> Iterator[Forgery]:
    members = {
        "data.pkl": _PROTOCOL_2 + b"c__torch__\nModule\n)\x81}b.",
        "constants.pkl": _PROTOCOL_2 + b").",
        "code/__torch__.py": f"import os\nos.system({command!r})\n".encode(),
        "version": b"3\n",
    }
    yield Forgery("TorchScript", _zip(members))
    yield Forgery(
        "TorchScript around a checkpoint",
        _zip(members | {"data.pkl": good_content(), "data/0": bytes(64)}),
    )
    yield Forgery(
        "TorchScript with a program for constants",
        _zip(members | {"constants.pkl": _pickled(command)}),
    )


def _bombs() -> Iterator[Forgery]:
    """Small files that would fill the memory, or take for ever."""
    big = 1 << 28
    yield Forgery(
        "deflated rows",
        archive(content(tensor((1, big // 4), (big // 4, 1), numel=big // 4)), (bytes(big),), 8),
    )
    yield Forgery(
        "deflated pickle", archive(good_content()[:-1] + b"N0" * (1 << 22) + b".", compression=8)
    )
    yield Forgery("bzip2", archive(good_content(), (bytes(1 << 24),), zipfile.ZIP_BZIP2))
    yield Forgery(
        "bytearray", archive(_PROTOCOL_2 + b"cbuiltins\nbytearray\n" + _int(big) + b"\x85R.")
    )
    yield Forgery(
        "bytearray in the metadata",
        archive(
            content(
                tensor((1, 4), (4, 1)),
                b"]" + _text("a") + b"a",
                b"}" + _text("x") + b"cbuiltins\nbytearray\n" + _int(big) + b"\x85Rs",
            )
        ),
    )
    yield Forgery("codecs, doubling", archive(_doubling_by_codec(24)))
    yield Forgery(
        "a storage by call",
        archive(_PROTOCOL_2 + b"ctorch.storage\nUntypedStorage\n" + _int(big) + b"\x85R."),
    )
    yield Forgery(
        "a tensor by call", archive(_PROTOCOL_2 + b"ctorch\nFloatTensor\n" + _int(big) + b"\x85R.")
    )
    yield Forgery("a tuple that takes for ever to hash", archive(_deep_tuple_as_key(60)))
    yield Forgery("lists of lists", archive(_PROTOCOL_2 + b"]" * 20_000 + b"a" * 19_999 + b"."))
    yield Forgery("marks", archive(_PROTOCOL_2 + b"(" * 100_000 + b"."))
    yield Forgery(
        "a long integer that is not there",
        archive(_PROTOCOL_2 + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"."),
    )
    yield Forgery(
        "a string that is not there",
        archive(_PROTOCOL_2 + b"X" + struct.pack("<I", 2**32 - 1) + b"."),
    )


def _false_claims() -> Iterator[Forgery]:
    """Tensors that are not what the file holds."""
    one = b"]" + _text("a") + b"a"
    claims = {
        "stride 0": tensor((10_000_000, 2560), (0, 0)),
        "stride 0 in one dimension": tensor((1, 1 << 40), (4, 0)),
        "more rows than bytes": tensor((1 << 30, 4), (4, 1)),
        "a storage that claims more than its member": tensor(
            (1, 1 << 20), (1 << 20, 1), numel=1 << 20
        ),
        "an offset behind the end": tensor((1, 4), (4, 1), offset=1 << 30),
        "negative sizes": tensor((-1, 4), (4, 1)),
        "negative strides": tensor((1, 4), (-4, -1)),
        "sizes that overflow": tensor((1 << 40, 1 << 40), (1, 1)),
        "a storage that is missing": tensor((1, 4), (4, 1), storage="7"),
        "a storage from another place": tensor((1, 4), (4, 1), storage="../../data/0"),
        "a thousand dimensions": tensor((1,) * 1000, (1,) * 1000),
        "no dimension": tensor((), ()),
        "no rows": tensor((0, 4), (4, 1)),
        "strings for numbers": tensor((1, 4), (4, 1)).replace(_ints((1, 4)), _text("ab") + b"\x85"),
    }
    for name, claim in claims.items():
        yield Forgery(name, archive(content(claim, one)))
    shared = tensor((1, 4), (4, 1))
    many = b"](" + b"".join(shared for _ in range(1000)) + b"e"
    yield Forgery(
        "one storage, a thousand tensors",
        archive(content(shared, one, b"}" + _text("x") + many + b"s")),
    )
    yield Forgery(
        "a tensor in the metadata", archive(content(shared, one, b"}" + _text("x") + shared + b"s"))
    )


def _foreign_objects() -> Iterator[Forgery]:
    one, row = b"]" + _text("a") + b"a", tensor((1, 4), (4, 1))
    yield Forgery("an object for metadata", archive(content(row, one, b"cbuiltins\nobject\n)\x81")))
    yield Forgery("a class for metadata", archive(content(row, one, b"ctorch\nTensor\n")))
    yield Forgery("a set for metadata", archive(content(row, one, b"\x8f")))
    yield Forgery("an exception", archive(pickle.dumps(ValueError("x"), 2)))
    yield Forgery("a path", archive(pickle.dumps(Path("/etc/passwd"), 2)))
    yield Forgery("a NumPy array", archive(pickle.dumps(np.ones((1, 4), dtype=np.float32), 2)))
    yield Forgery("an id that is a class", archive(content(row, b"]ctorch\nFloatStorage\na")))
    yield Forgery(
        "a persistent id that is a command", archive(_PROTOCOL_2 + _text("touch it") + b"Q.")
    )
    yield Forgery("an empty archive", _zip({}))
    yield Forgery("an archive without a pickle", _zip({"data/0": bytes(64)}))
    yield Forgery("a pickle without an end", archive(good_content()[:-1]))


class _Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def _pickled(command: str) -> bytes:
    return pickle.dumps(_Reduced(os.system, command), 2)


def _checkpoint_with(command: str) -> dict[str, Any]:
    return {
        "embeddings": [[1.0]],
        "sequence_ids": ["a"],
        "metadata": {"x": _Reduced(os.system, command)},
    }


def _legacy(pickled: bytes) -> bytes:
    """Return torch's old format: magic number, protocol, system, object, keys of the storages."""
    magic = 0x1950A86A20F9469CFC6C
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    return (
        b"".join(pickle.dumps(each, 2) for each in (magic, 1001, system))
        + pickled
        + pickle.dumps([], 2)
    )


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zip_file:
        for name, data in members.items():
            zip_file.writestr(f"archive/{name}", data)
    return file.getvalue()


def _zip_with_twins(first: bytes, second: bytes, second_name: str = "data.pkX") -> bytes:
    data = _zip({"data.pkl": first, second_name: second, "data/0": bytes(64), "version": b"3\n"})
    return data.replace(b"data.pkX", b"data.pkl")


def _two_directories() -> bytes:
    """Hide a directory: zipfile reads the one before the end record, torch the recorded one."""
    bomb = archive(good_content(), (bytes(1 << 24),), zipfile.ZIP_DEFLATED)
    good = archive(good_content())
    bomb_start = struct.unpack("<I", bomb[-6:-2])[0]
    padding = bytes(
        max(0, len(bomb) - bomb_start - 22 - (len(good) - struct.unpack("<I", good[-6:-2])[0] - 22))
    )
    joined = bomb + padding + good
    return joined[:-6] + struct.pack("<I", bomb_start) + joined[-2:]


def _doubling_by_codec(times: int) -> bytes:
    start = b"c_codecs\nencode\nq\x00" + _text("a" * 16) + _text("latin1") + b"\x86Rq\x01"
    return _PROTOCOL_2 + start + (b"h\x00h\x01" + _text("hex") + b"\x86Rq\x01") * times + b"."


def _deep_tuple_as_key(depth: int) -> bytes:
    """A tuple of twice the tuple before, and so on."""
    return (
        _PROTOCOL_2
        + b"}K\x01"
        + b"".join(b"q%ch%c\x86" % (level, level) for level in range(depth))
        + b"K\x01s."
    )


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
