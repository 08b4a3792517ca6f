"""Open input files: decompress them, detect changes while reading, report errors in one line."""

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

_NUM_SHOWN = 5
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK00PK\x03\x04")

# First bytes of text that is not UTF-8, with its codec: a byte order mark, or without one the
# first character of a record or of a comment.
_ENCODINGS = (
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "utf-32"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "utf-16"),
    (re.compile(rb"[>;#@]\0(?!\0\0)"), "utf-16-le"),
    (re.compile(rb"\0[>;#@](?!\0\0)"), "utf-16-be"),
)


@contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, plain or gz, bz2, xz, zst or zip, by its content.

    From a zip archive the FASTA files are read, one after another, or the only file.

    Raises:
        FastaError: It is missing, no file, unreadable or damaged, or an archive of something else.
    """
    with _one_line_errors(path), ExitStack() as stack:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise FastaError(
                f"{path}: this is a pipe or a device, and input is read more than once; give a "
                "file, or pipe it to `--fasta -`"
            )
        file = stack.enter_context(path.open("rb", buffering=BLOCK_BYTES))
        if start_of(file).startswith(_ZIP):
            yield buffered(_unzipped(path, stack.enter_context(zipfile.ZipFile(file))))
        else:
            yield _decompressing(file, path)


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a text file as `open_source` does, and read it as UTF-8, even if it is UTF-16 or UTF-32.

    Raises:
        FastaError: As `open_source`; or it is no text, by its first bytes.
    """
    with open_source(path) as file:
        start = start_of(file)
        if kind := binary_kind_of(start):
            refuse_kind(path, kind)
        encoding = next((name for mark, name in _ENCODINGS if mark.match(start)), None)
        with _one_line_errors(path):
            if encoding is None:
                yield file
            else:
                texts = codecs.iterdecode(iter(lambda: file.read(BLOCK_BYTES), b""), encoding)
                yield buffered(codecs.iterencode(texts, "utf-8"))


def start_of(file: BinaryIO) -> bytes:
    """Return the first bytes of a file from `open_source`, without consuming them."""
    return file.peek(START_BYTES)[:START_BYTES]  # type: ignore[attr-defined, no-any-return]


def refuse_kind(path: Path, kind: FileKind) -> NoReturn:
    """Raise FastaError for a file of a kind that is not read."""
    raise FastaError(f"{path}: this is not FASTA but {kind.name}; {kind.advice.format(path=path)}")


@contextmanager
def require_unchanged(path: Path) -> Iterator[None]:
    """Raise FastaError if a file changes within the block.

    This error replaces a FastaError of the block, since a file that is still being written has
    faults that the complete file does not have.
    """
    with _one_line_errors(path):
        before = path.stat()
        try:
            yield
        except FastaError:
            _require_same_stat(path, before)
            raise
        _require_same_stat(path, before)


def suffix_of(path: Path) -> str:
    """Return the suffix before that of a compression, in lower case: `.csv` of `x.CSV.gz`."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and of decompressors into FastaError."""
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
            f"{path}: this zip archive has a compression that is not supported ({error}); unpack "
            "it first"
        ) from error
    except OSError as error:
        raise FastaError(f"{path}: the file cannot be read ({error.strerror or error})") from error


def _decompressing(file: BinaryIO, path: Path) -> BinaryIO:
    return buffered(decompressed(file, str(path))) if is_compressed(start_of(file)) else file


def _unzipped(path: Path, archive: zipfile.ZipFile) -> Iterator[bytes]:
    """Yield the FASTA files of an archive, decompressed, each beginning on a line of its own."""
    for member in _members(path, archive):
        with archive.open(member) as file:
            content = _decompressing(file, path)  # type: ignore[arg-type]
            last = b""
            while block := content.read(BLOCK_BYTES):
                yield (last := block)
            if not last.endswith((b"\n", b"\r")):
                yield b"\n"


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the FASTA files of an archive, or its only file."""
    # macOS adds hidden files and a folder of metadata to the archives that it makes.
    files = [
        member
        for member in archive.infolist()
        if not member.is_dir()
        and not any(part.startswith((".", "__MACOSX")) for part in member.filename.split("/"))
    ]
    names = [member.filename for member in files]
    if kind := zip_kind_of(names):
        refuse_kind(path, kind)
    content = (
        f"it holds {listed([PurePosixPath(name).name for name in names], _NUM_SHOWN)}"
        if names
        else "it is empty"
    )
    suffixes = [suffix_of(Path(name)) for name in names]
    if set(suffixes) & {*PROTEIN_SUFFIXES} and set(suffixes) & {*NUCLEOTIDE_SUFFIXES}:
        raise FastaError(
            f"{path}: there are proteins and nucleotides in this zip archive ({content}); extract "
            f"the files to embed, for example with `unzip -p {path} '*.faa' > proteins.fasta`"
        )
    chosen = [
        member for member, suffix in zip(files, suffixes, strict=True) if suffix in FASTA_SUFFIXES
    ]
    chosen = chosen or (files if len(files) == 1 else [])
    if not chosen:
        raise FastaError(
            f"{path}: there is no FASTA file in this zip archive ({content}); wanted are names "
            f"that end in {', '.join(FASTA_SUFFIXES)}"
        )
    # Bit 0 of the flags marks an encrypted member.
    if any(member.flag_bits & 1 for member in chosen):
        raise FastaError(
            f"{path}: this zip archive is encrypted; unpack it first, with `unzip {path}`"
        )
    return chosen


def _require_same_stat(path: Path, before: os.stat_result) -> None:
    """Raise FastaError if a file's size or time of modification is another than before."""
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise FastaError(
            f"{path}: the file was changed while it was read ({before.st_size:,} bytes at first, "
            f"{after.st_size:,} at the end); wait until it is complete, then start again"
        )
