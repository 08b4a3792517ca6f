"""`vnp export`: the dataset once more, in a format that other tools read, whole or not at all."""

from __future__ import annotations

import importlib.util
import logging
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vnp_lib.dataset.formats.base import Format, Rows, ids_beside
from vnp_lib.dataset.formats.registry import FORMATS, RAGGED_FORMATS
from vnp_lib.dataset.reader import EmbeddingDataset, open_dataset
from vnp_lib.errors import ConfigError, StorageError
from vnp_lib.formatting import format_bytes
from vnp_lib.plan import StoreDtype
from vnp_lib.storage import make_directory, remove_orphaned_temporaries, require_free_space

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What an export left on disk."""

    path: Path
    num_rows: int
    num_quarantined: int  # sequences without a row
    num_missing: int  # the same, since they are not computed; 0 unless the dataset is partial
    size_bytes: int
    read: str  # Python that reads it

    def lines(self) -> Iterator[str]:
        """Say it to a person."""
        lacking = {"in quarantine": self.num_quarantined, "missing": self.num_missing}
        yield ", ".join(
            [
                f"{self.num_rows:,} sequences exported",
                *(f"{count:,} {what}" for what, count in lacking.items() if count),
            ]
        )
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
    """Write a run's dataset in another format. The dataset stays as it is.

    Memory is for a part of the dataset and a few batches, about 200 MiB, whatever the number of rows: for VirNucPro's files
    400 MiB, for safetensors 8 bytes a row more; where residues have values of their own, the longest sequence's too. What is
    under the final name is whole and durable, also where the export is killed; what a killed one left is removed by the next
    one there.

    Args:
        run: The run directory, or the dataset in it.
        to: One of `FORMATS`; where residues have values of their own, one of `RAGGED_FORMATS`.
        column: Of the dataset: `mean_33`. By default the only one of vectors; all of them where the format holds several.
        output: The file, or the directory for a format that is one; its suffix is added where it lacks it. By default in
            `exports` in the run directory.
        dtype: In which precision to store the values. Values that float16 cannot hold are an error.
        replace: Write over what is there; a directory only if it holds nothing but `.pt` files.
        allow_partial: Take a dataset from which sequences are missing.

    Raises:
        ConfigError: There is no dataset, it is partial, it has no such column, or several to choose from, the format cannot
            take it, a library is missing, or something is there already.
        StorageError: The dataset is damaged, or the disk takes no more.
    """
    dataset = _open(run, allow_partial=allow_partial)
    rows = Rows(dataset=dataset, columns=_columns(dataset, to, column), dtype=dtype)
    chosen = _format(to, rows)
    _require_dtype(to, chosen, dtype)
    _require_library(to, chosen)
    path = _path(rows, to, chosen, output)
    _require_place(path, chosen, replace=replace)
    _advise(to, chosen, rows)
    try:
        make_directory(path.parent)
        remove_orphaned_temporaries(path.parent)
        require_free_space(path.parent, chosen.size_bytes(rows))
        chosen.write(rows, path, replace)
    except FileExistsError as error:  # it was not there when we looked
        raise ConfigError(
            f"{error.filename} is there already: give --force to replace it"
        ) from error
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error}); nothing is left of it: make room, or choose another --output"
        ) from error
    return Export(
        path=path,
        num_rows=len(rows),
        num_quarantined=dataset.metadata["num_quarantined"],
        num_missing=dataset.metadata["num_missing"],
        size_bytes=sum(_size_bytes(each) for each in chosen.files(path)),
        read=chosen.read.format(path=str(path), ids_path=str(ids_beside(path))).strip(),
    )


def _open(run: Path, *, allow_partial: bool) -> EmbeddingDataset:
    try:
        dataset = open_dataset(run)
    except StorageError as error:
        raise ConfigError(str(error)) from error
    if (num_missing := dataset.metadata["num_missing"]) and not allow_partial:
        raise ConfigError(
            f"{run}: {num_missing:,} sequences are missing from the dataset; start the run again to complete it, or "
            f"export what there is with --allow-partial"
        )
    return dataset


def _columns(dataset: EmbeddingDataset, to: str, column: str | None) -> tuple[str, ...]:
    there_are = f"{dataset.directory} has the columns {', '.join(dataset.columns)}"
    if column is not None:
        if column not in dataset.columns:
            raise ConfigError(f"--column {column}: there is no such column; {there_are}")
        return (column,)
    if FORMATS[to].holds_several:
        return tuple(dataset.columns)
    vectors = [name for name, output in dataset.columns.items() if output.is_fixed]
    columns = vectors or list(dataset.columns)
    if len(columns) > 1:
        raise ConfigError(
            f"{there_are}, and --to {to} holds one: choose with --column {columns[0]}, for example"
        )
    return tuple(columns)


def _format(to: str, rows: Rows) -> Format:
    if rows.is_fixed:
        return FORMATS[to]
    if to not in RAGGED_FORMATS:
        raise ConfigError(
            f"--to {to} has a vector for each sequence, and {', '.join(rows.columns)} has values for each residue: choose one of "
            f"{', '.join(RAGGED_FORMATS)}, or another --column"
        )
    return RAGGED_FORMATS[to]


def _require_dtype(to: str, chosen: Format, dtype: StoreDtype) -> None:
    if dtype not in chosen.dtypes:
        raise ConfigError(
            f"--to {to} stores {chosen.dtypes[0]} only, which its readers expect: leave --store-dtype out"
        )


def _require_library(to: str, chosen: Format) -> None:
    if chosen.library is not None and importlib.util.find_spec(chosen.library) is None:
        raise ConfigError(
            f"--to {to} needs {chosen.library}: pip install 'vnp[export]', or pip install {chosen.library}"
        )


def _path(rows: Rows, to: str, chosen: Format, output: Path | None) -> Path:
    if output is None:
        chosen_columns = () if rows.columns == tuple(rows.dataset.columns) else rows.columns
        name = "-".join(["embeddings" if chosen.suffixes else to, *chosen_columns])
        return rows.dataset.directory.parent / "exports" / (name + "".join(chosen.suffixes[:1]))
    if chosen.suffixes and not output.name.endswith(chosen.suffixes):
        return output.with_name(output.name + chosen.suffixes[0])
    return output


def _require_place(path: Path, chosen: Format, *, replace: bool) -> None:
    """Say before anything is written that something is in the way."""
    taken = [each for each in chosen.files(path) if os.path.lexists(each)]
    if taken and not replace:
        raise ConfigError(
            f"{taken[0]} is there already: give --force to replace it, or another --output"
        )
    if taken and chosen.suffixes and path.is_dir():
        raise ConfigError(f"{path} is a directory, and the export is a file: give another --output")
    if taken and not chosen.suffixes and not _is_export(path):
        raise ConfigError(
            f"{path} holds more than an export, or something else: --force would remove all of it; give another --output"
        )


def _is_export(path: Path) -> bool:
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(each.is_dir() or each.name.endswith(".pt") for each in path.rglob("*"))
    )


def _size_bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())


def _advise(to: str, chosen: Format, rows: Rows) -> None:
    advised = chosen.num_rows_advised
    if advised is not None and len(rows) > advised:
        logger.warning(
            "--to %s does well with up to %s sequences, and these are %s: it will take %s, and be slow to read; "
            "npy, hdf5 and safetensors do not mind",
            to,
            f"{advised:,}",
            f"{len(rows):,}",
            format_bytes(chosen.size_bytes(rows)),
        )
