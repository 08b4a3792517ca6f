"""Mutants of `vnp_lib/inputs/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_FASTA = "tests/unit/inputs/test_fasta.py"

MUTANTS = (
    Mutant(
        name="punctuation-read-as-residues",
        module="inputs.characters",
        before="    return class_of(character).map == Treatment.UNKNOWN\n",
        after="    return class_of(character).error == Treatment.REFUSED\n",
        caught_by=(
            "tests/unit/inputs/test_characters.py::test_a_file_is_treated_as_the_table_says",
        ),
    ),
    Mutant(
        name="records-after-compressed-data-dropped",
        module="inputs.decompression",
        before="            _require_no_records(data, file, kind)\n",
        after="",
        caught_by=(
            "tests/unit/inputs/test_files.py::"
            "TestCompression::test_records_after_compressed_data_are_never_dropped",
        ),
    ),
    Mutant(
        name="line-cut-where-a-block-ends",
        module="inputs.fasta",
        before="        pieces = [block[stop:]]\n",
        after="        pieces = []\n",
        caught_by=(
            "tests/unit/inputs/test_files.py::"
            "TestEncodings::test_line_ends_are_found_at_ends_of_blocks",
        ),
    ),
    Mutant(
        name="byte-order-mark-taken-for-an-id",
        module="inputs.records",
        before="    if not joined.isascii() or _INVISIBLE.decode() in joined:\n",
        after="    if False:\n",
        caught_by=(
            "tests/unit/inputs/test_characters.py::test_the_id_is_the_first_word_of_a_header",
        ),
    ),
    Mutant(
        name="records-at-fault-left-out-unasked",
        module="inputs.reader",
        before="        if chunk.refused:\n                raise faults_error",
        after="        if False:\n                raise faults_error",
        caught_by=(f"{_FASTA}::test_a_bad_record_is_refused_by_file_line_and_id",),
    ),
    Mutant(
        name="changed-file-not-noticed",
        module="inputs.files",
        before="    if (after.st_size, after.st_mtime_ns) != "
        "(before.st_size, before.st_mtime_ns):\n",
        after="    if False:\n",
        caught_by=(f"{_FASTA}::test_a_file_that_is_being_written_is_refused_at_its_end",),
    ),
    Mutant(
        name="other-standard-input-taken-for-the-same",
        module="inputs.standard_input",
        before="                if block != kept.read(len(block)):\n",
        after="                if not kept.read(len(block)):\n",
        caught_by=(
            "tests/unit/inputs/test_reader.py::TestStandardInput::"
            "test_other_input_in_the_same_run_is_refused",
        ),
    ),
    Mutant(
        name="renamed-to-an-id-of-the-input",
        module="inputs.duplicates",
        before="is_free = place == self._taken.size or self._taken[place] != half\n",
        after="is_free = True\n",
        caught_by=(
            "tests/unit/inputs/test_duplicates.py::"
            "test_no_two_ids_are_equal_and_those_that_occur_once_stay",
        ),
    ),
    Mutant(
        name="column-names-for-proteins",
        module="inputs.in_memory",
        before="id_column, sequence_column)) is not None:\n        return _rows_with_ids",
        after="id_column, sequence_column)) is False:\n        return _rows_with_ids",
        caught_by=(
            "tests/unit/inputs/test_in_memory.py::"
            "test_each_row_is_that_of_the_sequence_with_its_id",
        ),
    ),
    Mutant(
        name="series-without-its-index",
        module="inputs.in_memory",
        before="zip(_to_list(given.index), values, strict=True)",
        after="enumerate(values)",
        caught_by=(
            "tests/unit/inputs/test_in_memory.py::"
            "test_a_filtered_series_keeps_the_ids_of_its_index",
        ),
    ),
    Mutant(
        name="overlaps-of-chunks-rounded-down",
        module="inputs.translation",
        before=" - min(index, num_longer)",
        after="",
        caught_by=("tests/unit/inputs/test_translation.py::test_chunks_overlap_evenly",),
    ),
    Mutant(
        name="a-file-given-twice-is-read-twice",
        module="inputs.sources",
        before="        if before is source:\n",
        after="        if True:\n",
        caught_by=(
            "tests/unit/inputs/test_sources.py::"
            "TestTwice::test_another_name_of_the_same_file_is_refused",
        ),
    ),
)
