"""Read the records of input files under a policy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from vnp_lib.errors import FastaError
from vnp_lib.inputs.chunks import InputChunk, apply_policy
from vnp_lib.inputs.duplicates import UniqueIds, digest_texts
from vnp_lib.inputs.fasta import is_fastq_file, read_fasta, read_fastq
from vnp_lib.inputs.files import require_unchanged
from vnp_lib.inputs.locations import RecordLocator, faults_error, name_in_errors
from vnp_lib.inputs.policy import InputPolicy
from vnp_lib.inputs.records import (
    PROTEINS,
    CharacterCounts,
    CheckedChunk,
    RawChunk,
    SequenceChunk,
    check_records,
    nucleotide_share,
)
from vnp_lib.inputs.sources import Source
from vnp_lib.inputs.tables import read_table
from vnp_lib.inputs.translation import NUCLEOTIDES, six_frames

IdRenamer: TypeAlias = Callable[[list[str]], tuple[list[str], int]]
"""Takes ids, and returns as many ids and the number of those that it changed."""

EMPTY_ADVICE = "write an empty dataset with --allow-empty"

# Shares of A, C, G, T, U and N in the residues of a sample of records. Proteins have about 0.25.
_MIN_NUCLEOTIDE_SHARE_OF_NUCLEOTIDES = 0.6
MAX_NUCLEOTIDE_SHARE_OF_PROTEINS = 0.95
_SAMPLE = 1000


def read_with_faults(
    source: Source, policy: InputPolicy, *, chunk_size: int = 8192, rename: IdRenamer | None = None
) -> Iterator[InputChunk]:
    """Read every record of a source, in order, and continue after those that are refused.

    Args:
        source: The file.
        policy: What to do with its records.
        chunk_size: Maximum number of records that are read at a time.
        rename: Makes ids unique over all sources, which are read one after another: see
            `make_id_renamer`.

    Raises:
        FastaError: The file as a whole cannot be used.
    """
    alphabet = NUCLEOTIDES if policy.translate else PROTEINS
    num_read = 0
    with name_in_errors(source), require_unchanged(source.path):
        for raw in _read_raw(source, policy, chunk_size):
            if num_read == 0:
                _refuse_other_kind(source.path, raw.sequences[:_SAMPLE], policy, source.alternative)
            checked = check_records(
                raw, alphabet, first_record=num_read, maps_unknown=policy.invalid_residues == "map"
            )
            num_read += len(raw.headers)
            if policy.translate:
                yield from _translate(checked, policy, rename)
                continue
            chunk = apply_policy(checked, policy)
            texts, num_renamed = _renamed(chunk.usable, rename)
            yield replace(chunk, usable=texts, num_renamed=num_renamed)
        if num_read == 0 and not policy.allow_empty:
            raise FastaError(
                f"{source.path}: there is no sequence in it; give a file with at least one "
                f"record, or {EMPTY_ADVICE}"
            )


def read_records(
    source: Source, policy: InputPolicy, *, chunk_size: int = 8192, rename: IdRenamer | None = None
) -> Iterator[InputChunk]:
    """Read every record of a source as `read_with_faults` does, but raise an error for faults.

    Raises:
        FastaError: Records are refused, or the file as a whole cannot be used.
    """
    # A record may be at fault only because the file is still being written.
    with require_unchanged(source.path):
        for chunk in read_with_faults(source, policy, chunk_size=chunk_size, rename=rename):
            if chunk.refused:
                raise faults_error(source, chunk.refused)
            yield chunk


def make_id_renamer(sources: Sequence[Source], policy: InputPolicy) -> IdRenamer | None:
    """Return a renamer of repeated ids for one pass over all sources; None if none is wanted.

    All ids are read for this, as far as possible. Errors are left to the pass over the records.
    """
    if policy.duplicate_ids != "rename":
        return None
    digests = bytearray()

    def collect(ids: list[str]) -> tuple[list[str], int]:
        digests.extend(digest_texts(ids))
        return ids, 0

    for source in sources:
        with suppress(FastaError):
            for _ in read_with_faults(source, policy, rename=collect):
                pass
    return UniqueIds(digests).rename


def chunk_from_memory(ids: list[str], sequences: list[str]) -> InputChunk:
    """Check and normalise records in memory as `read_records` does those of a file.

    Raises:
        FastaError: There are none, they look like nucleotides, or one has an id that is empty or
            has white space in it, no residues, or a character that the model does not know.
    """
    if not ids:
        raise FastaError("there is no sequence to embed; give at least one, or allow_empty=True")
    for record, sequence_id in enumerate(ids):
        if sequence_id and sequence_id.split() != [sequence_id]:
            raise FastaError(
                f"record {record}: the id {sequence_id!r} has white space in it; give its first "
                "word, or replace that by '_'"
            )
    policy = InputPolicy()
    raw = RawChunk(headers=ids, sequences=[sequence.replace("\n", " ") for sequence in sequences])
    _refuse_other_kind("these sequences", raw.sequences[:_SAMPLE], policy)
    chunk = apply_policy(check_records(raw, PROTEINS, first_record=0), policy)
    if chunk.refused:
        raise FastaError(f"record {chunk.refused[0].record}: {chunk.refused[0].reason}")
    return chunk


def locate_records(
    sources: Sequence[Source], policy: InputPolicy, ordinals: Collection[int]
) -> dict[int, tuple[str, str]]:
    """Return the id and the place, for people, of usable records. The sources are read again.

    Args:
        sources: The input.
        policy: The policy under which the records were counted.
        ordinals: Numbers of the records among the usable ones of all sources, from 0.
    """
    found: dict[int, tuple[str, str]] = {}
    ordinal = 0
    for source in sources if ordinals else ():
        places = RecordLocator(source)
        # Errors of the file have been reported by the first pass.
        with suppress(FastaError):
            for chunk in read_with_faults(source, policy):
                for record, sequence_id in zip(chunk.records, chunk.usable.ids, strict=True):
                    if ordinal in ordinals:
                        found[ordinal] = sequence_id, places.describe(record)
                    ordinal += 1
    return found


def _read_raw(source: Source, policy: InputPolicy, chunk_size: int) -> Iterator[RawChunk]:
    """Read the records of a source as they are there, by its format."""
    path = source.path
    # An empty file has no records, whatever format its name promises.
    if path.is_file() and path.stat().st_size == 0:
        return iter(())
    if source.format.is_table:
        return read_table(
            source,
            id_column=policy.id_column,
            sequence_column=policy.sequence_column,
            chunk_size=chunk_size,
        )
    if policy.translate and is_fastq_file(path):
        return read_fastq(path, chunk_size=chunk_size)
    return read_fasta(path, chunk_size=chunk_size)


def _refuse_other_kind(
    path: Path | str, sequences: list[str], policy: InputPolicy, alternative: str = ""
) -> None:
    """Raise FastaError for nucleotides instead of proteins, and the other way round."""
    others = f"; or give the other files: {alternative}" if alternative else ""
    share = nucleotide_share(sequences)
    found = (
        f"{share:.0%} of the residues in the first {len(sequences)} records are A, C, G, T, U or N"
    )
    if not policy.translate and share >= MAX_NUCLEOTIDE_SHARE_OF_PROTEINS:
        raise FastaError(
            f"{path}: this looks like nucleotides ({found}); ESM-2 takes proteins: translate it "
            "first, for example with `prodigal -a` or `seqkit translate`, or as VirNucPro does "
            f"with --translate six-frame{others}"
        )
    if policy.translate and any(sequences) and share < _MIN_NUCLEOTIDE_SHARE_OF_NUCLEOTIDES:
        raise FastaError(
            f"{path}: this looks like proteins ({found}); remove --translate to embed them as "
            f"they are{others}"
        )


def _translate(
    checked: CheckedChunk, policy: InputPolicy, rename: IdRenamer | None
) -> Iterator[InputChunk]:
    """Translate nucleotides, and apply the policy to the proteins.

    The nucleotides are renamed, since their proteins are named after them.
    """
    texts, num_renamed = _renamed(checked.usable, rename)
    empty = SequenceChunk(ids=[], descriptions=[], sequences=[])
    yield replace(
        apply_policy(replace(checked, usable=empty, records=[]), policy), num_renamed=num_renamed
    )
    for proteins, places in six_frames(texts, chunk_length=policy.chunk_length):
        records = [checked.records[place] for place in places]
        yield apply_policy(
            CheckedChunk(usable=proteins, records=records, faults=[], letters=CharacterCounts()),
            policy,
        )


def _renamed(texts: SequenceChunk, rename: IdRenamer | None) -> tuple[SequenceChunk, int]:
    """Return records with unique ids, and how many of them were renamed."""
    if rename is None:
        return texts, 0
    ids, num_renamed = rename(texts.ids)
    return replace(texts, ids=ids), num_renamed
