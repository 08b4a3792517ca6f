"""Reading CSV, TSV and Parquet files, row by row, as the records that their cells stand for."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from vnp_lib.errors import FastaError
from vnp_lib.inputs.file_kinds import binary_kind_of
from vnp_lib.inputs.files import open_source, open_text, start_of, suffix_of
from vnp_lib.inputs.records import RawChunk

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET = (".parquet", ".pq")
_BLOCK_BYTES = 8 * 1024**2  # of a CSV file: what is read at a time, and the longest row


def is_table(path: Path) -> bool:
    """Whether it is one, by its name: .csv and .tsv, which may be compressed, .parquet and .pq."""
    return _is_csv(path) or path.suffix.lower() in _PARQUET


def read_table(
    path: Path, *, id_column: str, sequence_column: str, chunk_size: int = 8192
) -> Iterator[RawChunk]:
    """Read every row, in order. A cell with an id is taken as a FASTA header is; a line break in a cell is white space.

    Raises:
        FastaError: As `open_source`; or the file is not what its name says, lacks a column, or a cell is no UTF-8 text.
    """
    columns = (id_column, sequence_column)
    with (open_text if _is_csv(path) else open_source)(path) as file:
        try:
            for batch in (_csv_batches if _is_csv(path) else _parquet_batches)(path, file, columns):
                for start in range(0, batch.num_rows, chunk_size):
                    headers, sequences = (
                        _texts(batch.column(name).slice(start, chunk_size)) for name in columns
                    )
                    yield RawChunk(
                        headers=[" ".join(header.splitlines()) for header in headers],
                        sequences=[sequence.replace("\n", " ") for sequence in sequences],
                    )
        except (pa.ArrowException, UnicodeDecodeError) as error:
            kind = path.suffix if path.suffix.lower() in _PARQUET else suffix_of(path)
            raise FastaError(
                f"{path}: this cannot be read as {kind.removeprefix('.')} ({error}); mend it"
            ) from error


def row_of(path: Path, record: int) -> int:
    """The row of a record, which counts from 0, as a spreadsheet shows it: from 1, and in CSV after that of the header."""
    return record + (2 if _is_csv(path) else 1)


def _is_csv(path: Path) -> bool:
    return suffix_of(path) in _DELIMITERS


def _csv_batches(path: Path, file: BinaryIO, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    delimiter = _DELIMITERS[suffix_of(path)]
    with open_text(path) as again:
        lines = csv.reader(
            io.TextIOWrapper(again, encoding="utf-8-sig", errors="replace", newline=""),
            delimiter=delimiter,
        )
        names = next(filter(None, lines), [])
    if not names:
        return
    if names[0].startswith(">"):
        raise FastaError(
            f"{path}: this is FASTA, by its looks, and no table; have its name end in .fasta"
        )
    _require_columns(path, names, columns)
    yield from pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(
            block_size=_BLOCK_BYTES, use_threads=False
        ),  # with threads errors tell no row
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.string()),
            null_values=[],
            strings_can_be_null=False,
        ),
    )


def _parquet_batches(
    path: Path, file: BinaryIO, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    kind = binary_kind_of(start := start_of(file))
    if kind and not start.startswith(b"PAR1"):
        raise FastaError(
            f"{path}: this is not Parquet but {kind.name}; {kind.advice.format(path=path)}"
        )
    parquet = pq.ParquetFile(file)
    _require_columns(path, parquet.schema_arrow.names, columns)
    yield from parquet.iter_batches(columns=list(columns))


def _require_columns(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in found:
            raise FastaError(
                f"{path}: there is no column {name!r}, but {', '.join(map(repr, found))}; "
                f"say with --id-column and --sequence-column which they are"
            )


def _texts(column: pa.Array) -> list[str]:
    """The texts of a column, "" for those that are missing."""
    return [text or "" for text in column.cast(pa.string()).to_pylist()]
