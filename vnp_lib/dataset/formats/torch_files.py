"""What fair-esm's scripts/extract.py saves of a sequence, under its names."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vnp_lib.dataset.formats.base import Rows
from vnp_lib.errors import ConfigError
from vnp_lib.plan import Output, OutputKind, Values
from vnp_lib.storage import durable_directory, path_below

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

_VIRNUCPRO_FILE_SEQUENCES = 10_000


def extract_file(label: str, outputs: Mapping[Output, Tensor]) -> dict[str, Any]:
    """What the file of a sequence holds: `label`, and tensors by kind and, where they are of a layer, by layer.

    `representations`, `mean_representations`, `bos_representations` and `contacts` are fair-esm's; `max_representations`,
    `std_representations` and `logits`, which it does not save, are ours.
    """
    held: dict[str, Any] = {"label": label}
    for output, tensor in outputs.items():
        if output.layer is None:
            held[output.name] = tensor
        else:
            held.setdefault(_name_of(output.kind), {})[output.layer] = tensor
    return held


def _name_of(kind: OutputKind) -> str:
    return "representations" if kind == OutputKind.PER_TOK else f"{kind}_representations"


def write_virnucpro(rows: Rows, path: Path, replace: bool) -> None:
    """`output_1_ESM.pt`, ..., as VirNucPro's own ESM-2 step leaves them for its merge step.

    Each is `{"proteins": [id, ...], "data": [tensor, ...]}`, one float32 tensor, (D,), a protein. File k has what is left
    of the k-th 10,000 sequences of the input, as VirNucPro splits them: its merge step joins files by their numbers, and
    rows within a file by id. So a sequence in quarantine moves no other to another file.
    """
    num_files = -(-int(rows.dataset.metadata["num_sequences"]) // _VIRNUCPRO_FILE_SEQUENCES)
    with durable_directory(path, replace=replace) as directory:
        targets = [directory / f"output_{number}_ESM.pt" for number in range(1, num_files + 1)]
        for number, group in groupby(
            _placed_tensors(rows), key=lambda each: each[0] // _VIRNUCPRO_FILE_SEQUENCES
        ):
            _, ids, tensors = zip(*group, strict=True)
            _save({"proteins": list(ids), "data": list(tensors)}, targets[number])
        for target in targets:
            if not target.exists():
                _save({"proteins": [], "data": []}, target)


def write_esm_extract(rows: Rows, path: Path, replace: bool) -> None:
    """`{header}.pt` for each sequence, as fair-esm's scripts/extract.py writes it, with all columns.

    Each is what `extract_file` makes of it. As there, a "/" in the header makes directories; what would lead elsewhere is
    refused.
    """
    with durable_directory(path, replace=replace) as directory:
        for header, arrays in rows.headed():
            target = _path_of(header, directory)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _save(
                    extract_file(
                        header, {output: _tensor(array) for output, array in arrays.items()}
                    ),
                    target,
                )
            except (FileExistsError, NotADirectoryError):
                raise ConfigError(
                    f"another sequence has the file of {header!r} already: choose another format"
                ) from None


def _placed_tensors(rows: Rows) -> Iterator[tuple[int, str, Tensor]]:
    for ordinals, ids, values in rows.placed():
        yield from zip(ordinals, ids, map(_tensor, values), strict=True)


def _tensor(array: Values) -> Tensor:
    """A tensor that owns its memory: torch.save writes all of the memory of which a tensor is a part."""
    import torch

    return torch.from_numpy(array).clone()


def _save(value: Any, path: Path) -> None:
    """Write what torch.save makes of `value`. FileExistsError if the file is there."""
    import torch

    data = io.BytesIO()  # its own writer hides what the disk said
    torch.save(value, data)
    with path.open("xb") as file:
        file.write(data.getbuffer())


def _path_of(header: str, directory: Path) -> Path:
    """Where fair-esm's extract.py puts the file of a sequence."""
    try:
        return path_below(directory, f"{header}.pt")
    except ValueError as error:
        raise ConfigError(f"{header!r} {error}: choose another format") from None
