"""Export to PyTorch files: those of fair-esm's extract.py, and those of VirNucPro."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnp_lib.dataset.formats.base import ExportRows
from vnp_lib.errors import ConfigError
from vnp_lib.plan import Output, OutputKind, Values
from vnp_lib.storage import durable_directory, path_below

if TYPE_CHECKING:
    # torch takes seconds to import.
    from torch import Tensor

_VIRNUCPRO_FILE_SEQUENCES = 10_000


def extract_file(label: str, outputs: Mapping[Output, Tensor]) -> dict[str, Any]:
    """Return the content of a sequence's file: `label`, and tensors by kind and layer.

    The names are those of fair-esm's scripts/extract.py: `representations`, `mean_representations`,
    `bos_representations` and `contacts`. It does not save `max_representations`,
    `std_representations` and `logits`.
    """
    content: dict[str, Any] = {"label": label}
    for output, tensor in outputs.items():
        if output.layer is None:
            content[output.name] = tensor
        else:
            prefix = "" if output.kind is OutputKind.PER_TOK else f"{output.kind}_"
            content.setdefault(f"{prefix}representations", {})[output.layer] = tensor
    return content


def write_virnucpro(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write `output_1_ESM.pt`, ..., as VirNucPro's own ESM-2 step does for its merge step.

    Each is `{"proteins": [id, ...], "data": [tensor, ...]}`, with one float32 tensor, (D,), per
    protein. File k has the rows of the k-th 10,000 sequences of the input, as VirNucPro divides
    them: its merge step joins files by number, and rows within a file by id. A quarantined sequence
    therefore moves no other to another file.
    """
    num_files = -(-int(rows.dataset.metadata["num_sequences"]) // _VIRNUCPRO_FILE_SEQUENCES)
    with durable_directory(path, replace=replace) as directory:
        targets = [directory / f"output_{number}_ESM.pt" for number in range(1, num_files + 1)]
        placed = (
            row
            for ordinals, ids, values in rows.batches_with_ordinals()
            for row in zip(ordinals, ids, map(_tensor, values), strict=True)
        )
        for number, group in groupby(placed, key=lambda row: row[0] // _VIRNUCPRO_FILE_SEQUENCES):
            _, ids, tensors = zip(*group, strict=True)
            _save({"proteins": list(ids), "data": list(tensors)}, targets[number])
        # The merge step expects a file also if all of its sequences are quarantined.
        for target in targets:
            if not target.exists():
                _save({"proteins": [], "data": []}, target)


def write_esm_extract(rows: ExportRows, path: Path, replace: bool) -> None:
    """Write `{header}.pt` with all columns for each sequence, as fair-esm's extract.py does.

    As there, a "/" in the header makes directories; one that leads outside of `path` is refused.
    """
    with durable_directory(path, replace=replace) as directory:
        for header, arrays in rows.with_headers():
            tensors = {output: _tensor(array) for output, array in arrays.items()}
            try:
                target = path_below(directory, f"{header}.pt")
            except ValueError as error:
                raise ConfigError(f"{header!r} {error}: choose another format") from None
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _save(extract_file(header, tensors), target)
            except (FileExistsError, NotADirectoryError):
                raise ConfigError(
                    f"another sequence has the file of {header!r} already: choose another format"
                ) from None


def _tensor(array: Values) -> Tensor:
    """Return a tensor that owns its memory."""
    import torch

    # torch.save writes all of the memory of which a tensor is a part.
    return torch.from_numpy(array).clone()


def _save(value: Any, path: Path) -> None:
    """Save a value in a new file, or raise FileExistsError."""
    import torch

    # The writer of torch.save hides errors of the disk.
    data = io.BytesIO()
    torch.save(value, data)
    with path.open("xb") as file:
        file.write(data.getbuffer())
