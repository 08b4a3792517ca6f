"""Mutants of `vnp_lib/dataset/`."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_DATASET = "tests/unit/dataset/test_reader.py"
_EXPORT = "tests/unit/dataset/test_export.py"

MUTANTS = (
    Mutant(
        name="parts-not-compared-with-success",
        module="dataset.reader",
        before='digest_file(file).sha256 != part["sha256"]',
        after="not digest_file(file).sha256",
        caught_by=(f"{_DATASET}::test_a_flipped_bit_is_found_and_never_changes_a_row",),
    ),
    Mutant(
        name="exported-ids-with-the-matrix-of-another-export",
        module="dataset.formats.numpy_files",
        before="        if replace and path.exists():\n",
        after="        if False:\n",
        caught_by=(f"{_EXPORT}::test_a_matrix_never_exists_with_the_ids_of_another",),
    ),
    Mutant(
        name="infinite-float16-exported",
        module="dataset.formats.base",
        before="        if not is_finite.all():\n",
        after="        if False:\n",
        caught_by=(f"{_EXPORT}::test_float16_overflow_names_the_sequence",),
    ),
    Mutant(
        name="virnucpro-file-missing",
        module="dataset.formats.torch_files",
        before="            if not target.exists():\n",
        after="            if False:\n",
        caught_by=(f"{_EXPORT}::test_virnucpro_gets_a_file_for_quarantined_sequences_too",),
    ),
    Mutant(
        name="full-disk-not-noticed-by-hdf5",
        module="dataset.formats.hdf5",
        before="            file.raise_write_error()\n\n\ndef write_hdf5(",
        after="            pass\n\n\ndef write_hdf5(",
        caught_by=(
            "tests/unit/dataset/test_hdf5.py::test_a_failed_write_is_raised_on_close_at_the_latest",
        ),
    ),
    Mutant(
        name="force-removes-anything",
        module="dataset.export",
        before="    if not is_export:\n",
        after="    if False:\n",
        caught_by=(f"{_EXPORT}::test_force_removes_nothing_that_is_no_export",),
    ),
)
