"""User input: find the files, read their records, check them against the policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vnp_lib.lazy import lazy_face

if TYPE_CHECKING:
    from vnp_lib.inputs.duplicates import DIGEST_BYTES, digests_of, find_repeats
    from vnp_lib.inputs.fasta import holds_fastq, read_fasta
    from vnp_lib.inputs.files import unchanging
    from vnp_lib.inputs.in_memory import Proteins, RecordsInMemory, files_or_records
    from vnp_lib.inputs.policy import VIRNUCPRO_RESIDUES, InputCounts, InputPolicy
    from vnp_lib.inputs.reader import (
        EMPTY_ADVICE,
        MOST_NUCLEOTIDES_IN_PROTEINS,
        InputChunk,
        Places,
        Rename,
        from_memory,
        named,
        places_of,
        read,
        refusal,
        renaming_of,
        survey,
    )
    from vnp_lib.inputs.records import (
        PROTEINS,
        Fault,
        LetterCounts,
        SequenceChunk,
        check,
        nucleotide_share,
    )
    from vnp_lib.inputs.sources import STDIN, Source, describe_left_out, find_sources, is_there
    from vnp_lib.inputs.standard_input import keep_stdin, require_piped_stdin

__all__ = [
    "DIGEST_BYTES",
    "EMPTY_ADVICE",
    "MOST_NUCLEOTIDES_IN_PROTEINS",
    "PROTEINS",
    "STDIN",
    "VIRNUCPRO_RESIDUES",
    "Fault",
    "InputChunk",
    "InputCounts",
    "InputPolicy",
    "LetterCounts",
    "Places",
    "Proteins",
    "RecordsInMemory",
    "Rename",
    "SequenceChunk",
    "Source",
    "check",
    "describe_left_out",
    "digests_of",
    "files_or_records",
    "find_repeats",
    "find_sources",
    "from_memory",
    "holds_fastq",
    "is_there",
    "keep_stdin",
    "named",
    "nucleotide_share",
    "places_of",
    "read",
    "read_fasta",
    "refusal",
    "renaming_of",
    "require_piped_stdin",
    "survey",
    "unchanging",
]

__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "DIGEST_BYTES": "vnp_lib.inputs.duplicates",
        "EMPTY_ADVICE": "vnp_lib.inputs.reader",
        "Fault": "vnp_lib.inputs.records",
        "InputChunk": "vnp_lib.inputs.reader",
        "InputCounts": "vnp_lib.inputs.policy",
        "InputPolicy": "vnp_lib.inputs.policy",
        "LetterCounts": "vnp_lib.inputs.records",
        "MOST_NUCLEOTIDES_IN_PROTEINS": "vnp_lib.inputs.reader",
        "PROTEINS": "vnp_lib.inputs.records",
        "Places": "vnp_lib.inputs.reader",
        "Proteins": "vnp_lib.inputs.in_memory",
        "RecordsInMemory": "vnp_lib.inputs.in_memory",
        "Rename": "vnp_lib.inputs.reader",
        "STDIN": "vnp_lib.inputs.sources",
        "SequenceChunk": "vnp_lib.inputs.records",
        "Source": "vnp_lib.inputs.sources",
        "VIRNUCPRO_RESIDUES": "vnp_lib.inputs.policy",
        "check": "vnp_lib.inputs.records",
        "describe_left_out": "vnp_lib.inputs.sources",
        "digests_of": "vnp_lib.inputs.duplicates",
        "files_or_records": "vnp_lib.inputs.in_memory",
        "find_repeats": "vnp_lib.inputs.duplicates",
        "find_sources": "vnp_lib.inputs.sources",
        "from_memory": "vnp_lib.inputs.reader",
        "holds_fastq": "vnp_lib.inputs.fasta",
        "is_there": "vnp_lib.inputs.sources",
        "keep_stdin": "vnp_lib.inputs.standard_input",
        "named": "vnp_lib.inputs.reader",
        "nucleotide_share": "vnp_lib.inputs.records",
        "places_of": "vnp_lib.inputs.reader",
        "read": "vnp_lib.inputs.reader",
        "read_fasta": "vnp_lib.inputs.fasta",
        "refusal": "vnp_lib.inputs.reader",
        "renaming_of": "vnp_lib.inputs.reader",
        "require_piped_stdin": "vnp_lib.inputs.standard_input",
        "survey": "vnp_lib.inputs.reader",
        "unchanging": "vnp_lib.inputs.files",
    },
)
