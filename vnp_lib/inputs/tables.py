"""Read records from the rows of CSV, TSV and Parquet files."""

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
from vnp_lib.inputs.files import open_source, open_text, start_of
from vnp_lib.inputs.records import RawChunk
from vnp_lib.inputs.sources import Source, SourceFormat

_DELIMITERS = {SourceFormat.CSV: ",", SourceFormat.TSV: "\t"}

# Size of the blocks in which a CSV file is read, and of its longest row.
_BLOCK_BYTES = 8 * 1024**2


def read_table(
    source: Source, *, id_column: str, sequence_column: str, chunk_size: int = 8192
) -> Iterator[RawChunk]:
    """Read every row of a table, in order.

    An id is taken from its cell as from a FASTA header; a line break in a cell is white space.

    Raises:
        FastaError: As `open_source`; or the file is not what its name says, lacks a column, or has
            a cell that is not UTF-8 text.
    """
    path, columns = source.path, (id_column, sequence_column)
    delimiter = _DELIMITERS.get(source.format)
    with (open_source if delimiter is None else open_text)(path) as file:
        try:
            batches = (
                _parquet_batches(path, file, columns)
                if delimiter is None
                else _csv_batches(path, file, columns, delimiter)
            )
            for batch in batches:
                for start in range(0, batch.num_rows, chunk_size):
                    # A missing cell is an empty text, whose record is refused by its row.
                    headers, sequences = (
                        [
                            text or ""
                            for text in batch.column(name)
                            .slice(start, chunk_size)
                            .cast(pa.string())
                            .to_pylist()
                        ]
                        for name in columns
                    )
                    yield RawChunk(
                        headers=[" ".join(header.splitlines()) for header in headers],
                        sequences=[sequence.replace("\n", " ") for sequence in sequences],
                    )
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise FastaError(
                f"{path}: this cannot be read as {source.format} ({error}); correct the file"
            ) from error


def _csv_batches(
    path: Path, file: BinaryIO, columns: Sequence[str], delimiter: str
) -> Iterator[pa.RecordBatch]:
    # The names are read by themselves first, so that the error for a missing column can list them.
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
        # With threads pyarrow's errors do not name the row.
        read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
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
                f"name the columns with --id-column and --sequence-column"
            )
