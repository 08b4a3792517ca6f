"""The input of a run: the files that are meant, and their records as the run takes them, under the policies it was given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import compress, islice
from operator import attrgetter, not_
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vnp_lib.errors import FastaError
from vnp_lib.inputs.duplicates import UniqueIds, digest_texts
from vnp_lib.inputs.fasta import header_lines, is_fastq_file, read_fasta, read_fastq
from vnp_lib.inputs.files import require_unchanged
from vnp_lib.inputs.policy import VIRNUCPRO_RESIDUES, InputCounts, InputPolicy
from vnp_lib.inputs.records import (
    PROTEINS,
    CharacterCounts,
    CheckedChunk,
    Fault,
    RawChunk,
    SequenceChunk,
    check_records,
    nucleotide_share,
)
from vnp_lib.inputs.sources import Source
from vnp_lib.inputs.tables import is_table, read_table, row_of
from vnp_lib.inputs.translation import NUCLEOTIDES, six_frames

IdRenamer: TypeAlias = Callable[
    [list[str]], tuple[list[str], int]
]  # ids to ids, and how many were changed
EMPTY_ADVICE = "have an empty dataset made with --allow-empty"

_LEAST_SHARE_IN_NUCLEOTIDES = 0.6  # of the letters; proteins have about 0.25
MAX_NUCLEOTIDE_SHARE_OF_PROTEINS = 0.95  # a share of the letters
_SAMPLE = 1000  # records
_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputChunk:
    """Consecutive records of one source, as the run takes them."""

    usable: SequenceChunk
    records: Sequence[
        int
    ]  # number in the source, from 0, of each that is usable; of what it was translated from
    lengths: NDArray[np.int32]  # residues, of each that is usable
    original_lengths: NDArray[np.int32]  # the same before any was cut
    refused: list[Fault]  # by record
    skipped: list[Fault]  # by record
    num_windowed: int = 0
    num_in_part: int = 0
    num_renamed: int = 0
    letters: CharacterCounts

    @property
    def counts(self) -> InputCounts:
        """All but the duplicates, which a chunk alone does not tell."""
        return InputCounts(
            num_skipped=len(self.skipped),
            num_cut=int(np.count_nonzero(self.lengths != self.original_lengths)),
            num_windowed=self.num_windowed,
            num_in_part=self.num_in_part,
            num_renamed=self.num_renamed,
            letters=self.letters,
        )


def read_with_faults(
    source: Source, policy: InputPolicy, *, chunk_size: int = 8192, rename: IdRenamer | None = None
) -> Iterator[InputChunk]:
    """Read every record of a source, in order, and go on after those that are refused.

    Args:
        source: The file.
        policy: What becomes of its records.
        chunk_size: Records that are read at a time, at most.
        rename: Makes the ids of all sources, which are read one after another, unique: see `make_id_renamer`.

    Raises:
        FastaError: It is not this or that record, but the file that cannot be used.
    """
    alphabet = NUCLEOTIDES if policy.translate else PROTEINS
    num_read = 0
    with name_in_errors(source), require_unchanged(source.path):
        for raw in _read(source.path, policy, chunk_size):
            if num_read == 0:
                _refuse_other_kind(source.path, raw.sequences[:_SAMPLE], policy, source.rather)
            checked = check_records(
                raw, alphabet, first_record=num_read, maps_unknown=policy.invalid_residues == "map"
            )
            num_read += len(raw.headers)
            yield from _taken(checked, policy, rename)
        if num_read == 0 and not policy.allow_empty:
            raise FastaError(
                f"{source.path}: there is no sequence in it; give a file with at least one record, or {EMPTY_ADVICE}"
            )


def read_records(
    source: Source, policy: InputPolicy, *, chunk_size: int = 8192, rename: IdRenamer | None = None
) -> Iterator[InputChunk]:
    """Read every record of a source as `read_with_faults` does, but raise FastaError for those that are refused."""
    with require_unchanged(source.path):  # a record is at fault for being half written, too
        for chunk in read_with_faults(source, policy, chunk_size=chunk_size, rename=rename):
            if chunk.refused:
                raise faults_error(source, chunk.refused)
            yield chunk


def make_id_renamer(sources: Sequence[Source], policy: InputPolicy) -> IdRenamer | None:
    """Return what renames ids that occur more than once, for one reading of all sources; None if that is not wanted.

    For this the ids are read, as far as they can be: what is wrong with a source is said when it is read for its records.
    """
    if policy.duplicate_ids != "rename":
        return None
    digests = bytearray()

    def take_down(ids: list[str]) -> tuple[list[str], int]:
        digests.extend(digest_texts(ids))
        return ids, 0

    for source in sources:
        with suppress(FastaError):
            for _ in read_with_faults(source, policy, rename=take_down):
                pass
    return UniqueIds(digests).rename


def chunk_from_memory(ids: list[str], sequences: list[str]) -> InputChunk:
    """Check and normalise records that are in memory, as `read_records` does those of a file.

    Raises:
        FastaError: There is none, they look like nucleotides, or one has an id that is empty or holds white space, no
            residues, or a letter that the model does not know.
    """
    if not ids:
        raise FastaError("there is no sequence to embed; give at least one, or allow_empty=True")
    for record, sequence_id in enumerate(ids):
        if sequence_id and sequence_id.split() != [sequence_id]:
            raise FastaError(
                f"record {record}: the id {sequence_id!r} has white space in it; give its first word, or replace that by '_'"
            )
    policy = InputPolicy()
    raw = RawChunk(headers=ids, sequences=[sequence.replace("\n", " ") for sequence in sequences])
    _refuse_other_kind("these sequences", raw.sequences[:_SAMPLE], policy)
    chunk = _under_policy(check_records(raw, PROTEINS, first_record=0), policy)
    if chunk.refused:
        raise FastaError(f"record {chunk.refused[0].record}: {chunk.refused[0].reason}")
    return chunk


class RecordLocator:
    """Where the records of a source are. Asked for in ascending order, they are found in one reading beside the other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lines: Iterator[int] = iter(())
        self._record = -1  # the last that was found
        self._line = 0

    def find(self, record: int) -> dict[str, int]:
        """The record's line, or in a table its row."""
        if is_table(self._source.path):
            return {"row": row_of(self._source.path, record)}
        if self._record < 0 or record < self._record:
            self._lines, self._record = header_lines(self._source.path), -1
        if record > self._record:
            self._line = next(islice(self._lines, record - self._record - 1, None))
            self._record = record
        return {"line": self._line}

    def describe(self, record: int) -> str:
        """The same for people: `proteins.fasta, line 8`."""
        ((what, number),) = self.find(record).items()
        return f"{self._source.name}, {what} {number}"


@contextmanager
def name_in_errors(source: Source) -> Iterator[None]:
    """Have errors call it what people do: where standard input is kept is no concern of theirs."""
    try:
        yield
    except FastaError as error:
        raise FastaError(str(error).replace(str(source.path), source.name)) from error


def faults_error(source: Source, faults: Sequence[Fault]) -> FastaError:
    """Name the first records that are refused, each in a line."""
    places = RecordLocator(source)
    lines = [f"{places.describe(fault.record)}: {fault.reason}" for fault in faults[:_NUM_SHOWN]]
    if len(faults) > _NUM_SHOWN:
        lines.append(f"and {len(faults) - _NUM_SHOWN:,} more among the first that were read")
    return FastaError("\n".join(lines))


def locate_records(
    sources: Sequence[Source], policy: InputPolicy, ordinals: Collection[int]
) -> dict[int, tuple[str, str]]:
    """Id and place, for people, of each of `ordinals`, which count the usable records of all sources. They are read again."""
    found: dict[int, tuple[str, str]] = {}
    ordinal = 0
    for source in sources if ordinals else ():
        places = RecordLocator(source)
        with suppress(FastaError):  # of the file: whoever asks has been told
            for chunk in read_with_faults(source, policy):
                for record, sequence_id in zip(chunk.records, chunk.usable.ids, strict=True):
                    if ordinal in ordinals:
                        found[ordinal] = sequence_id, places.describe(record)
                    ordinal += 1
    return found


def _read(path: Path, policy: InputPolicy, chunk_size: int) -> Iterator[RawChunk]:
    if path.is_file() and path.stat().st_size == 0:  # whatever kind of file its name promises
        return iter(())
    if is_table(path):
        return read_table(
            path,
            id_column=policy.id_column,
            sequence_column=policy.sequence_column,
            chunk_size=chunk_size,
        )
    if policy.translate and is_fastq_file(path):
        return read_fastq(path, chunk_size=chunk_size)
    return read_fasta(path, chunk_size=chunk_size)


def _refuse_other_kind(
    path: Path | str, sequences: list[str], policy: InputPolicy, rather: str = ""
) -> None:
    """Raise FastaError where these are nucleotides and should be proteins, or the other way round."""
    others = f"; or give the other files: {rather}" if rather else ""
    share = nucleotide_share(sequences)
    seen = (
        f"{share:.0%} of the letters in the first {len(sequences)} records are A, C, G, T, U or N"
    )
    if not policy.translate and share >= MAX_NUCLEOTIDE_SHARE_OF_PROTEINS:
        raise FastaError(
            f"{path}: this looks like nucleotides ({seen}); ESM-2 takes proteins: translate it first, for example with "
            f"`prodigal -a` or `seqkit translate`, or as VirNucPro does with --translate six-frame{others}"
        )
    if policy.translate and any(sequences) and share < _LEAST_SHARE_IN_NUCLEOTIDES:
        raise FastaError(
            f"{path}: this looks like proteins ({seen}); take --translate away to embed them as they are{others}"
        )


def _taken(
    checked: CheckedChunk, policy: InputPolicy, rename: IdRenamer | None
) -> Iterator[InputChunk]:
    """What a run takes of records that were checked. Proteins are named after their nucleotides, so these are renamed."""
    if policy.translate is None:
        chunk = _under_policy(checked, policy)
        texts, num_renamed = _renamed(chunk.usable, rename)
        yield replace(chunk, usable=texts, num_renamed=num_renamed)
        return
    texts, num_renamed = _renamed(checked.usable, rename)
    nothing = replace(
        checked, usable=SequenceChunk(ids=[], descriptions=[], sequences=[]), records=[]
    )
    yield replace(_under_policy(nothing, policy), num_renamed=num_renamed)
    for proteins, places in six_frames(texts, chunk_length=policy.chunk_length):
        records = [checked.records[place] for place in places]
        yield _under_policy(
            CheckedChunk(usable=proteins, records=records, faults=[], letters=CharacterCounts()),
            policy,
        )


def _renamed(texts: SequenceChunk, rename: IdRenamer | None) -> tuple[SequenceChunk, int]:
    if rename is None:
        return texts, 0
    ids, num_renamed = rename(texts.ids)
    return replace(texts, ids=ids), num_renamed


def _under_policy(checked: CheckedChunk, policy: InputPolicy) -> InputChunk:
    lengths = np.fromiter(
        map(len, checked.usable.sequences), dtype=np.int32, count=len(checked.usable.sequences)
    )
    skips_empty = policy.min_length is not None
    is_skipped = [
        policy.invalid_residues == "skip" or (skips_empty and fault.is_empty)
        for fault in checked.faults
    ]
    chunk = InputChunk(
        usable=checked.usable,
        records=checked.records,
        lengths=lengths,
        original_lengths=lengths,
        refused=[*compress(checked.faults, map(not_, is_skipped))],
        skipped=[*compress(checked.faults, is_skipped)],
        letters=checked.letters,
    )
    chunk = _without_short(chunk, policy.min_length)
    most = VIRNUCPRO_RESIDUES if policy.long == "virnucpro" else policy.max_length
    num_long = int(np.count_nonzero(chunk.lengths > most)) if most is not None else 0
    if most is None or not num_long or policy.long == "whole":
        return chunk
    match policy.long:
        case "window":
            return replace(chunk, num_windowed=num_long)
        case "virnucpro":
            return replace(chunk, num_in_part=num_long)
        case "truncate":
            cut = replace(
                chunk.usable, sequences=[sequence[:most] for sequence in chunk.usable.sequences]
            )
            return replace(chunk, usable=cut, lengths=np.minimum(chunk.lengths, most))
    return _without_long(chunk, most, skips=policy.long == "skip")


def _without_short(chunk: InputChunk, least: int | None) -> InputChunk:
    if least is None or not (chunk.lengths < least).any():
        return chunk
    kept = chunk.lengths >= least
    faults = _faults_of_length(chunk, ~kept, f"at least {least:,} are wanted")
    return replace(_only(chunk, kept), skipped=_in_order(chunk.skipped + faults))


def _without_long(chunk: InputChunk, most: int, *, skips: bool) -> InputChunk:
    kept = chunk.lengths <= most
    advice = (
        ""
        if skips
        else "; cut it or leave it out, or have that done with --long truncate or --long skip"
    )
    faults = _faults_of_length(chunk, ~kept, f"at most {most:,} are allowed{advice}")
    return replace(
        _only(chunk, kept),
        refused=chunk.refused if skips else _in_order(chunk.refused + faults),
        skipped=_in_order(chunk.skipped + faults) if skips else chunk.skipped,
    )


def _faults_of_length(chunk: InputChunk, is_at_fault: NDArray[np.bool_], why: str) -> list[Fault]:
    ids = chunk.usable.ids
    return [
        Fault(
            record=chunk.records[place],
            sequence_id=ids[place],
            reason=f"sequence {ids[place]!r} has {_residues(int(chunk.lengths[place]))}, and {why}",
        )
        for place in np.flatnonzero(is_at_fault).tolist()
    ]


def _residues(count: int) -> str:
    return "1 residue" if count == 1 else f"{count:,} residues"


def _only(chunk: InputChunk, is_kept: NDArray[np.bool_]) -> InputChunk:
    """The chunk without the usable records that are not kept."""
    texts, kept = chunk.usable, np.flatnonzero(is_kept).tolist()
    return replace(
        chunk,
        usable=SequenceChunk(
            ids=[texts.ids[place] for place in kept],
            descriptions=[texts.descriptions[place] for place in kept],
            sequences=[texts.sequences[place] for place in kept],
        ),
        records=[chunk.records[place] for place in kept],
        lengths=chunk.lengths[is_kept],
        original_lengths=chunk.original_lengths[is_kept],
    )


def _in_order(faults: list[Fault]) -> list[Fault]:
    return sorted(faults, key=attrgetter("record"))
