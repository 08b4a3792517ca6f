"""Export a dataset to a format that other tools read, completely or not at all."""

from __future__ import annotations

import importlib.util
import logging
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vnp_lib.dataset.formats.base import ExportRows, Format, ids_path_of
from vnp_lib.dataset.formats.registry import FORMATS, RAGGED_FORMATS
from vnp_lib.dataset.reader import EmbeddingDataset, open_dataset
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.formatting import format_bytes
from vnp_lib.plan import StoreDtype
from vnp_lib.storage import make_directory, remove_orphaned_temporaries, require_free_space

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A finished export."""

    path: Path
    num_rows: int
    # Sequences without a row, and those without one because they are not computed yet. The latter
    # is 0 unless the dataset is partial.
    num_quarantined: int
    num_missing: int
    size_bytes: int
    # Python code that reads it.
    read: str

    def lines(self) -> Iterator[str]:
        """Yield the lines that `vnp export` prints."""
        lacking = {"in quarantine": self.num_quarantined, "missing": self.num_missing}
        counts = [f"{count:,} {what}" for what, count in lacking.items() if count]
        yield ", ".join([f"{self.num_rows:,} sequences exported", *counts])
        yield f"export: {self.path} ({format_bytes(self.size_bytes)})"
        yield "read it back:"
        yield textwrap.indent(self.read, "    ")


def export_dataset(
    run: Path,
    to: str,
    *,
    column: str | None = None,
    output: Path | None = None,
    dtype: StoreDtype = StoreDtype.FLOAT32,
    replace: bool = False,
    allow_partial: bool = False,
) -> Export:
    """Write a run's dataset in another format. The dataset does not change.

    An export needs about 200 MiB of memory, whatever the number of rows; 400 MiB for VirNucPro's
    files, 8 bytes per row more for safetensors, and the longest sequence's outputs if they are per
    residue. A file of the final name is complete and durable, also if the export is killed; the
    next export to the same directory removes what a killed one left.

    Args:
        run: The run directory, or the dataset in it.
        to: One of `FORMATS`; for per-residue outputs, one of `RAGGED_FORMATS`.
        column: A column of the dataset, for example `mean_33`. By default the only column of
            vectors, or all columns if the format holds several.
        output: The file, or the directory for a format that is one; a missing suffix is added. By
            default in `exports` in the run directory.
        dtype: The precision of the stored values. A value that float16 cannot hold is an error.
        replace: Overwrite an existing export; a directory only if it holds nothing but `.pt` files.
        allow_partial: Accept a dataset from which sequences are missing.

    Raises:
        ConfigError: There is no dataset, it is partial, it has no such column or several to choose
            from, the format does not support it, a library is missing, or the output exists.
        StorageError: The dataset is damaged, or the disk is full.
    """
    dataset, columns = _open_columns(run, to, column, allow_partial=allow_partial)
    rows = ExportRows(dataset=dataset, columns=columns, dtype=dtype)
    chosen = _choose_format(to, rows)
    path = _choose_path(rows, to, chosen, output, replace=replace)
    size_bytes = chosen.size_bytes(rows)
    if chosen.num_rows_advised is not None and len(rows) > chosen.num_rows_advised:
        logger.warning(
            "--to %s is meant for up to %s sequences, and the dataset has %s: it will take %s, and "
            "be slow to read; npy, hdf5 and safetensors have no such limit",
            to,
            f"{chosen.num_rows_advised:,}",
            f"{len(rows):,}",
            format_bytes(size_bytes),
        )
    try:
        make_directory(path.parent)
        remove_orphaned_temporaries(path.parent)
        require_free_space(path.parent, size_bytes)
        chosen.write(rows, path, replace)
    except FileExistsError as error:
        # Another process has created it in the meantime.
        raise ConfigError(f"{error.filename} exists already: use --force to replace it") from error
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error}); nothing is left of it: make room, or "
            f"choose another --output"
        ) from error
    written = [file for each in chosen.files(path) for file in (each, *each.rglob("*"))]
    return Export(
        path=path,
        num_rows=len(rows),
        num_quarantined=dataset.metadata["num_quarantined"],
        num_missing=dataset.metadata["num_missing"],
        size_bytes=sum(file.stat().st_size for file in written if file.is_file()),
        read=chosen.read.format(path=str(path), ids_path=str(ids_path_of(path))).strip(),
    )


def _open_columns(
    run: Path, to: str, column: str | None, *, allow_partial: bool
) -> tuple[EmbeddingDataset, tuple[str, ...]]:
    """Open a dataset and choose the columns to export."""
    try:
        dataset = open_dataset(run)
    except StorageError as error:
        raise ConfigError(str(error)) from error
    if (num_missing := dataset.metadata["num_missing"]) and not allow_partial:
        raise ConfigError(
            f"{run}: {num_missing:,} sequences are missing from the dataset; start the run again "
            f"to complete it, or export it as it is with --allow-partial"
        )
    available = f"{dataset.directory} has the columns {', '.join(dataset.columns)}"
    if column is not None:
        if column not in dataset.columns:
            raise ConfigError(f"--column {column}: there is no such column; {available}")
        return dataset, (column,)
    if FORMATS[to].holds_several:
        return dataset, tuple(dataset.columns)
    vectors = [name for name, output in dataset.columns.items() if output.is_fixed]
    columns = vectors or list(dataset.columns)
    if len(columns) > 1:
        raise ConfigError(
            f"{available}, and --to {to} holds one: choose it, for example with "
            f"--column {columns[0]}"
        )
    return dataset, tuple(columns)


def _choose_format(to: str, rows: ExportRows) -> Format:
    """Return the format for the rows, after checking that it can be written."""
    if not rows.is_fixed and to not in RAGGED_FORMATS:
        raise ConfigError(
            f"--to {to} holds one vector per sequence, and {', '.join(rows.columns)} has values "
            f"per residue: choose one of {', '.join(RAGGED_FORMATS)}, or another --column"
        )
    chosen = FORMATS[to] if rows.is_fixed else RAGGED_FORMATS[to]
    if rows.dtype not in chosen.dtypes:
        raise ConfigError(
            f"--to {to} stores {chosen.dtypes[0]} only, as its readers expect: omit --store-dtype"
        )
    if chosen.library is not None and importlib.util.find_spec(chosen.library) is None:
        raise ConfigError(
            f"--to {to} needs {chosen.library}: pip install 'vnp[export]', or "
            f"pip install {chosen.library}"
        )
    return chosen


def _choose_path(
    rows: ExportRows, to: str, chosen: Format, output: Path | None, *, replace: bool
) -> Path:
    """Return the path of the export; raise ConfigError if nothing there may be replaced."""
    if output is None:
        chosen_columns = () if rows.columns == tuple(rows.dataset.columns) else rows.columns
        name = "-".join(["embeddings" if chosen.suffixes else to, *chosen_columns])
        path = rows.dataset.directory.parent / "exports" / (name + "".join(chosen.suffixes[:1]))
    elif chosen.suffixes and not output.name.endswith(chosen.suffixes):
        path = output.with_name(output.name + chosen.suffixes[0])
    else:
        path = output
    existing = [each for each in chosen.files(path) if os.path.lexists(each)]
    if not existing:
        return path
    if not replace:
        raise ConfigError(
            f"{existing[0]} exists already: use --force to replace it, or another --output"
        )
    if chosen.suffixes:
        if path.is_dir():
            raise ConfigError(
                f"{path} is a directory, and the export is a file: choose another --output"
            )
        return path
    # Replacing removes the whole directory, which may be a user's own.
    is_export = (
        path.is_dir()
        and not path.is_symlink()
        and all(each.is_dir() or each.name.endswith(".pt") for each in path.rglob("*"))
    )
    if not is_export:
        raise ConfigError(
            f"{path} holds more than an export, or something else: --force would remove all of it; "
            f"choose another --output"
        )
    return path
