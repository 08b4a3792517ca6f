"""Files that somebody gave us: opened whatever their compression, watched for change, their failures told in a sentence."""

from __future__ import annotations

import codecs
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

from vnp_lib.errors import FastaError
from vnp_lib.formatting import listed
from vnp_lib.inputs import decompression
from vnp_lib.inputs.decompression import BLOCK_BYTES, DAMAGE, buffered, decompressed, is_compressed
from vnp_lib.inputs.file_kinds import START_BYTES, FileKind, binary_kind_of, zip_kind_of

COMPRESSIONS = (*decompression.COMPRESSIONS, ".zip")

PROTEIN_SUFFIXES = (".faa", ".fsa_aa", ".aa", ".mpfa", ".pep")
NUCLEOTIDE_SUFFIXES = (".ffn", ".fna", ".frn")
FASTA_SUFFIXES = (".fa", ".fasta", ".fas", ".fsa", *PROTEIN_SUFFIXES, *NUCLEOTIDE_SUFFIXES)

_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK00PK\x03\x04")

# How text begins that is not in UTF-8, with the codec for it: byte order marks, and "> ", ";", "#" or "@" without one.
_ENCODINGS = (
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "utf-32"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "utf-16"),
    (re.compile(rb"[>;#@]\0(?!\0\0)"), "utf-16-le"),
    (re.compile(rb"\0[>;#@](?!\0\0)"), "utf-16-be"),
)


@contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, plain or gz, bz2, xz, zst or zip, told apart by their content.

    Of a zip archive the FASTA files are read, one after another, or the only file.

    Raises:
        FastaError: It is missing, no file, unreadable or damaged, or an archive of something else.
    """
    with _failures_told(path), ExitStack() as stack:
        _require_readable_twice(path)
        file = stack.enter_context(path.open("rb", buffering=BLOCK_BYTES))
        if start_of(file).startswith(_ZIP):
            yield buffered(_unzipped(path, stack.enter_context(zipfile.ZipFile(file))))
        else:
            yield _decompressing(file, path)


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text as `open_source` does; what is read is UTF-8, also where the file is UTF-16 or UTF-32.

    Raises:
        FastaError: As `open_source`; or it is no text, by its first bytes.
    """
    with open_source(path) as file:
        start = start_of(file)
        if kind := binary_kind_of(start):
            refuse_kind(path, kind)
        encoding = next((name for mark, name in _ENCODINGS if mark.match(start)), None)
        with _failures_told(path):
            yield file if encoding is None else buffered(_recoded(file, encoding))


def start_of(file: BinaryIO) -> bytes:
    """Return the first bytes of a file that `open_source` gave, which are still to be read afterwards."""
    return file.peek(START_BYTES)[:START_BYTES]  # type: ignore[attr-defined, no-any-return]


def refuse_kind(path: Path, kind: FileKind) -> NoReturn:
    """Raise FastaError for a file of a kind that is not read."""
    raise FastaError(f"{path}: this is not FASTA but {kind.name}; {kind.advice.format(path=path)}")


@contextmanager
def require_unchanged(path: Path) -> Iterator[None]:
    """Raise FastaError where a file is changed within the block: that counts for more than what was found at fault in it."""
    with _failures_told(path):
        before = path.stat()
        try:
            yield
        except FastaError:
            _require_unchanged(path, before)
            raise
        _require_unchanged(path, before)


def suffix_of(path: Path) -> str:
    """The suffix before that of a compression, in lower case: `.csv` of `x.CSV.gz`."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise FastaError(
            f"{path}: the compressed file is cut short or damaged ({error}); copy or make it again"
        ) from error
    except UnicodeDecodeError as error:
        raise FastaError(
            f"{path}: this is not the {error.encoding} text that it begins as; save it as UTF-8"
        ) from error
    except FileNotFoundError as error:
        raise FastaError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise FastaError(f"{path}: this is a directory; give the files in it") from error
    except NotImplementedError as error:
        raise FastaError(
            f"{path}: this zip archive is compressed in a way that is not known here ({error}); unpack it first"
        ) from error
    except OSError as error:
        raise FastaError(f"{path}: the file cannot be read ({error.strerror or error})") from error


def _decompressing(file: BinaryIO, path: Path) -> BinaryIO:
    return buffered(decompressed(file, str(path))) if is_compressed(start_of(file)) else file


def _unzipped(path: Path, archive: zipfile.ZipFile) -> Iterator[bytes]:
    """The FASTA files of an archive, decompressed, each beginning on a line of its own."""
    for member in _members(path, archive):
        with archive.open(member) as file:
            content = _decompressing(file, path)  # type: ignore[arg-type]
            last = b""
            while block := content.read(BLOCK_BYTES):
                yield (last := block)
            if not last.endswith((b"\n", b"\r")):
                yield b"\n"


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    files = [
        member
        for member in archive.infolist()
        if not member.is_dir()
        and not any(part.startswith((".", "__MACOSX")) for part in member.filename.split("/"))
    ]
    names = [member.filename for member in files]
    if kind := zip_kind_of(names):
        refuse_kind(path, kind)
    suffixes = [suffix_of(Path(name)) for name in names]
    if set(suffixes) & {*PROTEIN_SUFFIXES} and set(suffixes) & {*NUCLEOTIDE_SUFFIXES}:
        raise FastaError(
            f"{path}: there are proteins and nucleotides in this zip archive ({_describe_content(names)}); take out what is to be "
            f"embedded, for example with `unzip -p {path} '*.faa' > proteins.fasta`"
        )
    chosen = [
        member for member, suffix in zip(files, suffixes, strict=True) if suffix in FASTA_SUFFIXES
    ]
    chosen = chosen or (files if len(files) == 1 else [])
    if not chosen:
        raise FastaError(
            f"{path}: there is no FASTA file in this zip archive ({_describe_content(names)}); wanted are names that end in "
            f"{', '.join(FASTA_SUFFIXES)}"
        )
    if any(member.flag_bits & 1 for member in chosen):
        raise FastaError(
            f"{path}: this zip archive is encrypted; unpack it first, with `unzip {path}`"
        )
    return chosen


def _describe_content(names: list[str]) -> str:
    """Name the first of some files."""
    if not names:
        return "it is empty"
    return f"it holds {listed([PurePosixPath(name).name for name in names], 5)}"


def _recoded(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """Turn text of another encoding into UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    while block := file.read(BLOCK_BYTES):
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


def _require_readable_twice(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FastaError(
            f"{path}: this is a pipe or a device, and input is read more than once; give a file, or pipe it to `--fasta -`"
        )


def _require_unchanged(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise FastaError(
            f"{path}: the file was changed while it was read ({before.st_size:,} bytes at first, {after.st_size:,} at the "
            f"end); wait until it is complete, then start again"
        )
