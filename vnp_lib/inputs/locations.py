"""Locate records in their files, and name them in errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from vnp_lib.errors import FastaError
from vnp_lib.inputs.fasta import header_lines
from vnp_lib.inputs.records import Fault
from vnp_lib.inputs.sources import Source, SourceFormat

_NUM_SHOWN = 5


class RecordLocator:
    """Finds the lines or rows of a source's records.

    Records that are requested in ascending order are found in one pass over the file.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lines: Iterator[int] = iter(())
        self._record = -1  # the last that was found
        self._line = 0

    def find(self, record: int) -> dict[str, int]:
        """Return the line of a record, or in a table its row, by the name of the unit.

        Rows are counted as in a spreadsheet: from 1, after the header of a CSV file.
        """
        if self._source.format.is_table:
            first_row = 1 if self._source.format == SourceFormat.PARQUET else 2
            return {"row": record + first_row}
        if self._record < 0 or record < self._record:
            self._lines, self._record = header_lines(self._source.path), -1
        if record > self._record:
            self._line = next(islice(self._lines, record - self._record - 1, None))
            self._record = record
        return {"line": self._line}

    def describe(self, record: int) -> str:
        """Return the place of a record for people: `proteins.fasta, line 8`."""
        ((unit, number),) = self.find(record).items()
        return f"{self._source.name}, {unit} {number}"


@contextmanager
def name_in_errors(source: Source) -> Iterator[None]:
    """Replace the path of a source in errors by its name for people.

    A user knows standard input, but not the file that it is saved in.
    """
    try:
        yield
    except FastaError as error:
        raise FastaError(str(error).replace(str(source.path), source.name)) from error


def faults_error(source: Source, faults: Sequence[Fault]) -> FastaError:
    """Return an error that names the first refused records, one per line."""
    places = RecordLocator(source)
    lines = [f"{places.describe(fault.record)}: {fault.reason}" for fault in faults[:_NUM_SHOWN]]
    if len(faults) > _NUM_SHOWN:
        lines.append(f"and {len(faults) - _NUM_SHOWN:,} more among the first that were read")
    return FastaError("\n".join(lines))
