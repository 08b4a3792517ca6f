"""User input: find the files, read their records, check them against the policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.inputs.chunks import InputChunk
    from vnp_lib.inputs.duplicates import DIGEST_BYTES, digest_texts, find_repeats
    from vnp_lib.inputs.fasta import is_fastq_file, read_fasta
    from vnp_lib.inputs.files import require_unchanged
    from vnp_lib.inputs.in_memory import Proteins, RecordsInMemory, files_or_records
    from vnp_lib.inputs.locations import RecordLocator, faults_error, name_in_errors
    from vnp_lib.inputs.policy import VIRNUCPRO_RESIDUES, InputCounts, InputPolicy
    from vnp_lib.inputs.reader import (
        EMPTY_ADVICE,
        MAX_NUCLEOTIDE_SHARE_OF_PROTEINS,
        IdRenamer,
        chunk_from_memory,
        locate_records,
        make_id_renamer,
        read_records,
        read_with_faults,
    )
    from vnp_lib.inputs.records import (
        PROTEINS,
        CharacterCounts,
        Fault,
        SequenceChunk,
        check_records,
        nucleotide_share,
    )
    from vnp_lib.inputs.sources import STDIN, Source, describe_left_out, find_sources, input_exists
    from vnp_lib.inputs.standard_input import require_piped_stdin, save_stdin

__all__ = [
    "DIGEST_BYTES",
    "EMPTY_ADVICE",
    "MAX_NUCLEOTIDE_SHARE_OF_PROTEINS",
    "PROTEINS",
    "STDIN",
    "VIRNUCPRO_RESIDUES",
    "CharacterCounts",
    "Fault",
    "IdRenamer",
    "InputChunk",
    "InputCounts",
    "InputPolicy",
    "Proteins",
    "RecordLocator",
    "RecordsInMemory",
    "SequenceChunk",
    "Source",
    "check_records",
    "chunk_from_memory",
    "describe_left_out",
    "digest_texts",
    "faults_error",
    "files_or_records",
    "find_repeats",
    "find_sources",
    "input_exists",
    "is_fastq_file",
    "locate_records",
    "make_id_renamer",
    "name_in_errors",
    "nucleotide_share",
    "read_fasta",
    "read_records",
    "read_with_faults",
    "require_piped_stdin",
    "require_unchanged",
    "save_stdin",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "CharacterCounts": "vnp_lib.inputs.records",
        "DIGEST_BYTES": "vnp_lib.inputs.duplicates",
        "EMPTY_ADVICE": "vnp_lib.inputs.reader",
        "Fault": "vnp_lib.inputs.records",
        "IdRenamer": "vnp_lib.inputs.reader",
        "InputChunk": "vnp_lib.inputs.chunks",
        "InputCounts": "vnp_lib.inputs.policy",
        "InputPolicy": "vnp_lib.inputs.policy",
        "MAX_NUCLEOTIDE_SHARE_OF_PROTEINS": "vnp_lib.inputs.reader",
        "PROTEINS": "vnp_lib.inputs.records",
        "Proteins": "vnp_lib.inputs.in_memory",
        "RecordLocator": "vnp_lib.inputs.locations",
        "RecordsInMemory": "vnp_lib.inputs.in_memory",
        "STDIN": "vnp_lib.inputs.sources",
        "SequenceChunk": "vnp_lib.inputs.records",
        "Source": "vnp_lib.inputs.sources",
        "VIRNUCPRO_RESIDUES": "vnp_lib.inputs.policy",
        "check_records": "vnp_lib.inputs.records",
        "chunk_from_memory": "vnp_lib.inputs.reader",
        "describe_left_out": "vnp_lib.inputs.sources",
        "digest_texts": "vnp_lib.inputs.duplicates",
        "faults_error": "vnp_lib.inputs.locations",
        "files_or_records": "vnp_lib.inputs.in_memory",
        "find_repeats": "vnp_lib.inputs.duplicates",
        "find_sources": "vnp_lib.inputs.sources",
        "input_exists": "vnp_lib.inputs.sources",
        "is_fastq_file": "vnp_lib.inputs.fasta",
        "locate_records": "vnp_lib.inputs.reader",
        "make_id_renamer": "vnp_lib.inputs.reader",
        "name_in_errors": "vnp_lib.inputs.locations",
        "nucleotide_share": "vnp_lib.inputs.records",
        "read_fasta": "vnp_lib.inputs.fasta",
        "read_records": "vnp_lib.inputs.reader",
        "read_with_faults": "vnp_lib.inputs.reader",
        "require_piped_stdin": "vnp_lib.inputs.standard_input",
        "require_unchanged": "vnp_lib.inputs.files",
        "save_stdin": "vnp_lib.inputs.standard_input",
    },
)
