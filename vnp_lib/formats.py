"""The formats in which a dataset can be exported, each as its readers expect it.

Every writer takes the rows a batch at a time, so that memory does not grow with their number, and leaves its file or
directory whole or not at all. Errors of the disk come out as OSError.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import DTypeLike

from vnp_lib import files
from vnp_lib.dataset import EmbeddingDataset, as_rows
from vnp_lib.failures import ConfigError
from vnp_lib.files import durable_directory, durable_file, durable_path, path_below
from vnp_lib.hdf5 import Hdf5File, open_hdf5
from vnp_lib.outputs import StoreDtype, Values, as_stored

if TYPE_CHECKING:  # it takes seconds to import, and most formats do without
    from torch import Tensor

_BATCH_BYTES = 16 * 1024**2  # of embeddings, at a time
_CHUNK_BYTES = 1024**2  # of an HDF5 dataset: what is read to get at one row
_VIRNUCPRO_FILE_SEQUENCES = 10_000


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is to be exported: the rows of a dataset, in input order."""

    dataset: EmbeddingDataset
    dtype: StoreDtype

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def dim(self) -> int:
        return self.dataset.dim

    @property
    def layer(self) -> int:
        return int(self.dataset.metadata["identity"]["layer"])

    @property
    def about(self) -> dict[str, str]:
        """What the embeddings are of: model, layer, pooling, dtype of the computation, fingerprint of the run."""
        identity = self.dataset.metadata["identity"]
        known = {name: str(identity[name]) for name in ("model", "layer", "pooling", "dtype")}
        return known | {"fingerprint": str(self.dataset.metadata["fingerprint"])}

    @cached_property
    def id_width(self) -> int:
        """Characters of the longest id."""
        return max(len(sequence_id) for ids in self.ids() for sequence_id in ids)

    def ids(self) -> Iterator[list[str]]:
        for batch in self._batches("id"):
            yield _ids(batch)

    def batches(self) -> Iterator[tuple[list[str], Values]]:
        """Ids and embeddings, (n, dim)."""
        for batch in self._batches("id", "embedding"):
            ids = _ids(batch)
            yield ids, self._values(ids, batch)

    def headers(self) -> Iterator[tuple[list[str], Values]]:
        """FASTA headers without ">", one space between id and description, and embeddings, (n, dim)."""
        for batch in self._batches("id", "description", "embedding"):
            ids = _ids(batch)
            described = zip(ids, batch.column("description").to_pylist(), strict=True)
            yield [f"{id_} {description}".rstrip() for id_, description in described], self._values(ids, batch)

    def placed(self) -> Iterator[tuple[list[int], list[str], Values]]:
        """Positions in the input, from 0, ids and embeddings, (n, dim)."""
        for batch in self._batches("ordinal", "id", "embedding"):
            ids = _ids(batch)
            yield batch.column("ordinal").to_pylist(), ids, self._values(ids, batch)

    def _batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        return self.dataset.record_batches(max(1, _BATCH_BYTES // (4 * self.dim)), columns)

    def _values(self, ids: list[str], batch: pa.RecordBatch) -> Values:
        rows = as_rows(batch.column("embedding"))
        if self.dtype is StoreDtype.FLOAT32:
            return rows
        halved = as_stored(rows, self.dtype)
        is_finite = np.isfinite(halved).all(axis=1)
        if not is_finite.all():
            row = int(np.argmin(is_finite))
            raise ConfigError(
                f"the embedding of {ids[row]!r} has a value of {np.abs(rows[row]).max():,.0f}, and float16 ends at 65,504: "
                f"export with --store-dtype float32"
            )
        return halved


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format: how it is written, what that takes, and how it is read."""

    write: Callable[[Rows, Path, bool], None]  # rows, where to, whether to replace what is there
    about: str  # in a line
    suffixes: tuple[str, ...] = ()  # names that a file may have, the first by default; none: it is a directory
    has_ids_beside: bool = False  # a second file, `ids_beside`
    library: str | None = None  # needed to write it, and not among what is always there
    dtypes: tuple[StoreDtype, ...] = tuple(StoreDtype)
    bytes_per_value: int | None = None  # where it is text
    bytes_per_row: int = 64  # besides the values
    num_rows_advised: int | None = None  # more are warned of
    read: str = field(repr=False)  # Python that gives `ids` and `embeddings`, of `path`

    def files(self, path: Path) -> list[Path]:
        """What is written for `path`, by name: it, and the ids beside it where they are a file of their own."""
        return [path, ids_beside(path)] if self.has_ids_beside else [path]

    def size_bytes(self, rows: Rows) -> int:
        """Space that it takes on disk, about."""
        bytes_per_value = self.bytes_per_value or np.dtype(rows.dtype).itemsize
        return len(rows) * (rows.dim * bytes_per_value + self.bytes_per_row)


def write_npy(rows: Rows, path: Path, replace: bool) -> None:
    """One matrix, (N, D), and beside it the ids, a line each. The matrix is never there without its own ids."""
    ids_path = ids_beside(path)
    with durable_file(path, replace=replace) as matrix, durable_file(ids_path, replace=replace) as lines:
        _write_npy_header(matrix, (len(rows), rows.dim), rows.dtype)
        for ids, values in rows.batches():
            matrix.write(values.data)
            lines.write("".join(f"{sequence_id}\n" for sequence_id in ids).encode())
        if replace and path.exists():
            files.ops.unlink(path)
            files.fsync_directory(path.parent)


def ids_beside(path: Path) -> Path:
    """Where the ids of a `.npy` file are: `x.ids.txt` beside `x.npy`."""
    return path.with_name(path.name.removesuffix(".npy") + ".ids.txt")


def write_npz(rows: Rows, path: Path, replace: bool) -> None:
    """The arrays `ids` and `embeddings`, uncompressed."""
    id_dtype = f"<U{rows.id_width}"
    with durable_file(path, replace=replace) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("ids.npy", "w", force_zip64=True) as member:
            _write_npy_header(member, (len(rows),), id_dtype)
            for ids in rows.ids():
                member.write(np.array(ids, dtype=id_dtype).tobytes())
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            _write_npy_header(member, (len(rows), rows.dim), rows.dtype)
            for _, values in rows.batches():
                member.write(values.data)


def write_csv(rows: Rows, path: Path, replace: bool) -> None:
    """The columns `id` and `dim_0` to `dim_{D-1}`, in as many digits as it takes to read the same numbers back."""
    names = ["id", *(f"dim_{number}" for number in range(rows.dim))]
    schema = pa.schema([(name, pa.string() if name == "id" else pa.float32()) for name in names])
    with durable_file(path, replace=replace) as file, pyarrow.csv.CSVWriter(file, schema) as writer:
        for ids, values in rows.batches():
            columns = np.ascontiguousarray(values.T, dtype=np.float32)
            writer.write_batch(pa.record_batch([pa.array(ids), *map(pa.array, columns)], schema=schema))


def write_hdf5(rows: Rows, path: Path, replace: bool) -> None:
    """The datasets `embeddings`, (N, D), chunked, and `sequence_ids`, (N,), strings of any length."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        embeddings = _create_matrix(file.root, "embeddings", rows)
        sequence_ids = _create_strings(file.root, "sequence_ids", len(rows))
        _fill(file, embeddings, sequence_ids, rows)


def write_hdf5_uniprot(rows: Rows, path: Path, replace: bool) -> None:
    """A dataset for each accession, (D,), all at the root."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        for ids, values in rows.batches():
            for sequence_id, row in zip(ids, values, strict=True):
                file.root.create_dataset(_key(sequence_id, taken=file.root), data=row, track_times=False)
            file.require_sound()


def accession(sequence_id: str) -> str:
    """The accession in an id of UniProt's, `P12345` of `sp|P12345|NAME`; of any other, all of it."""
    database, *rest = sequence_id.split("|")
    return rest[0] if database in ("sp", "tr") and rest and rest[0] else sequence_id


def write_h5ad(rows: Rows, path: Path, replace: bool) -> None:
    """X, (N, D), with the ids as `obs_names` and `dim_0` to `dim_{D-1}` as `var_names`.

    It follows anndata's on-disk format of version 0.1.0 (anndata 0.8 and later): anndata itself would take the whole of X.
    """
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _encode(file.root, "anndata", "0.1.0")
        matrix = _encode(_create_matrix(file.root, "X", rows), "array", "0.2.0")
        names = _create_index(file.root.create_group("obs"), len(rows))
        dimensions = _create_index(file.root.create_group("var"), rows.dim)
        dimensions[:] = [f"dim_{number}" for number in range(rows.dim)]
        for group in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            _encode(file.root.create_group(group), "dict", "0.1.0")
        _fill(file, matrix, names, rows)


def write_safetensors(rows: Rows, path: Path, replace: bool) -> None:
    """The tensors `embeddings`, (N, D), `ids`, uint8, all ids in UTF-8 end to end, and `id_offsets`, int64, (N + 1,).

    The ids are tensors since the header, where `__metadata__` is, may have no more than 100 MB and is read as a whole by
    everybody who opens the file.
    """
    lengths = (len(sequence_id.encode()) for ids in rows.ids() for sequence_id in ids)
    offsets = np.zeros(len(rows) + 1, dtype="<i8")
    np.cumsum(np.fromiter(lengths, dtype=np.int64, count=len(rows)), out=offsets[1:])
    matrix_bytes = len(rows) * rows.dim * np.dtype(rows.dtype).itemsize
    dtype = {StoreDtype.FLOAT32: "F32", StoreDtype.FLOAT16: "F16"}[rows.dtype]
    tensors = (  # the widest first: so they are all aligned
        ("id_offsets", "I64", [len(rows) + 1], offsets.nbytes),
        ("embeddings", dtype, [len(rows), rows.dim], matrix_bytes),
        ("ids", "U8", [int(offsets[-1])], int(offsets[-1])),
    )
    with durable_file(path, replace=replace) as file:
        file.write(_safetensors_header(tensors, rows.about))
        file.write(offsets.data)
        for _, values in rows.batches():
            file.write(values.data)
        for ids in rows.ids():
            file.write("".join(ids).encode())


def write_virnucpro(rows: Rows, path: Path, replace: bool) -> None:
    """`output_1_ESM.pt`, ..., as VirNucPro's own ESM-2 step leaves them for its merge step.

    Each is `{"proteins": [id, ...], "data": [tensor, ...]}`, one float32 tensor, (D,), a protein. File k has what is left
    of the k-th 10,000 sequences of the input, as VirNucPro splits them: its merge step joins files by their numbers, and
    rows within a file by id. So a sequence in quarantine moves no other to another file.
    """
    num_files = -(-int(rows.dataset.metadata["num_sequences"]) // _VIRNUCPRO_FILE_SEQUENCES)
    with durable_directory(path, replace=replace) as directory:
        targets = [directory / f"output_{number}_ESM.pt" for number in range(1, num_files + 1)]
        for number, group in groupby(_placed_tensors(rows), key=lambda each: each[0] // _VIRNUCPRO_FILE_SEQUENCES):
            _, ids, tensors = zip(*group, strict=True)
            _save({"proteins": list(ids), "data": list(tensors)}, targets[number])
        for target in targets:
            if not target.exists():
                _save({"proteins": [], "data": []}, target)


def write_esm_extract(rows: Rows, path: Path, replace: bool) -> None:
    """`{header}.pt` for each sequence, as fair-esm's scripts/extract.py --include mean writes it.

    Each is `{"label": header, "mean_representations": {layer: tensor}}`. As there, a "/" in the header makes directories;
    what would lead elsewhere is refused.
    """
    with durable_directory(path, replace=replace) as directory:
        for headers, values in rows.headers():
            for header, tensor in zip(headers, _tensors(values), strict=True):
                target = _path_of(header, directory)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _save({"label": header, "mean_representations": {rows.layer: tensor}}, target)
                except (FileExistsError, NotADirectoryError):
                    raise ConfigError(
                        f"another sequence has the file of {header!r} already: choose another format"
                    ) from None


FORMATS = {
    "npy": Format(
        write=write_npy,
        about="NumPy: one float matrix (N, D), and the ids in NAME.ids.txt, a line each; for faiss and memory maps",
        suffixes=(".npy",),
        has_ids_beside=True,
        read="""
import numpy as np
embeddings = np.load({path!r}, mmap_mode="r")
with open({ids_path!r}, encoding="utf-8") as lines:
    ids = lines.read().splitlines()
""",
    ),
    "npz": Format(
        write=write_npz,
        about="NumPy: the arrays `ids` and `embeddings` in one file; reading takes memory for all",
        suffixes=(".npz",),
        read="""
import numpy as np
arrays = np.load({path!r})
ids, embeddings = arrays["ids"], arrays["embeddings"]
""",
    ),
    "csv": Format(
        write=write_csv,
        about="text: the columns `id`, `dim_0`, ...; three times as large as the dataset, for small ones",
        suffixes=(".csv",),
        bytes_per_value=13,
        num_rows_advised=100_000,
        read="""
import pandas as pd
table = pd.read_csv({path!r}, dtype={{"id": str}}, keep_default_na=False, index_col="id", float_precision="round_trip")
ids, embeddings = list(table.index), table.to_numpy("float32")
""",
    ),
    "hdf5": Format(
        write=write_hdf5,
        about="HDF5: the datasets `embeddings` (N, D) and `sequence_ids`, as virnucpro-broad has them",
        suffixes=(".h5", ".hdf5"),
        library="h5py",
        read="""
import h5py
with h5py.File({path!r}) as file:
    ids = file["sequence_ids"].asstr()[:]
    embeddings = file["embeddings"][:]
""",
    ),
    "hdf5-uniprot": Format(
        write=write_hdf5_uniprot,
        about="HDF5: a dataset (D,) for each accession, as UniProt's downloads; up to a million sequences",
        suffixes=(".uniprot.h5", ".h5", ".hdf5"),
        library="h5py",
        bytes_per_row=600,
        num_rows_advised=1_000_000,
        read="""
import h5py
with h5py.File({path!r}) as file:
    embeddings = {{accession: dataset[:] for accession, dataset in file.items()}}
""",
    ),
    "h5ad": Format(
        write=write_h5ad,
        about="anndata and scanpy: X (N, D) with the ids as `obs_names`",
        suffixes=(".h5ad",),
        library="h5py",
        read="""
import anndata
table = anndata.read_h5ad({path!r})
ids, embeddings = list(table.obs_names), table.X
""",
    ),
    "safetensors": Format(
        write=write_safetensors,
        about="safetensors: the tensors `embeddings` (N, D), and `ids` with `id_offsets`",
        suffixes=(".safetensors",),
        read="""
from itertools import pairwise
from safetensors import safe_open
with safe_open({path!r}, framework="pt") as file:
    embeddings, offsets = file.get_tensor("embeddings"), file.get_tensor("id_offsets").tolist()
    text = file.get_tensor("ids").numpy().tobytes()
ids = [text[start:stop].decode() for start, stop in pairwise(offsets)]
""",
    ),
    "virnucpro": Format(
        write=write_virnucpro,
        about="a directory of output_1_ESM.pt, ..., for VirNucPro's merge step; 10,000 sequences a file, float32",
        dtypes=(StoreDtype.FLOAT32,),
        bytes_per_row=512,
        read="""
import torch
from pathlib import Path
ids, embeddings = [], []
for number in range(1, len(list(Path({path!r}).iterdir())) + 1):
    file = torch.load(Path({path!r}, f"output_{{number}}_ESM.pt"))
    ids += file["proteins"]
    embeddings += file["data"]
""",
    ),
    "esm-extract": Format(
        write=write_esm_extract,
        about="a directory with HEADER.pt for each sequence, as fair-esm's extract.py writes; up to a million",
        bytes_per_row=6_000,  # blocks of 4 KiB
        num_rows_advised=1_000_000,
        read="""
import torch
from pathlib import Path
files = [torch.load(path) for path in Path({path!r}).rglob("*.pt")]
embeddings = {{file["label"]: file["mean_representations"] for file in files}}
""",
    ),
}


def _ids(batch: pa.RecordBatch) -> list[str]:
    """The ids of a batch; one that would not come out of a text file or of HDF5 as it went in is refused."""
    ids: list[str] = batch.column("id").to_pylist()
    text = "\n".join(ids)
    if "\0" in text or len(text.splitlines()) != len(ids):
        odd = next(sequence_id for sequence_id in ids if "\0" in sequence_id or len(sequence_id.splitlines()) != 1)
        raise ConfigError(f"the id {odd!r} has a line break or NUL in it, which readers of these formats do not expect")
    return ids


def _write_npy_header(file: IO[bytes] | io.RawIOBase, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    described = {"descr": np.dtype(dtype).newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)


def _safetensors_header(tensors: Sequence[tuple[str, str, list[int], int]], about: dict[str, str]) -> bytes:
    """Of tensors that lie end to end, by name, dtype, shape and bytes. The length comes first, then JSON, a multiple of 8."""
    ends = list(accumulate(size_bytes for *_, size_bytes in tensors))
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | about}
    for (name, dtype, shape, _), start, end in zip(tensors, chain([0], ends), ends, strict=False):
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _key(sequence_id: str, *, taken: Container[str]) -> str:
    key = accession(sequence_id)
    if "/" in key or key == ".":
        raise ConfigError(f"{sequence_id!r} cannot be a name at the root of an HDF5 file: choose another format")
    if key in taken:
        raise ConfigError(
            f"{sequence_id!r} is not the only sequence with the accession {key!r}, and there is one place for each: choose "
            f"another format"
        )
    return key


def _describe(group: Any, rows: Rows) -> None:
    about = rows.about
    group.attrs.update({"model_name": about.pop("model")} | about)


def _create_matrix(group: Any, name: str, rows: Rows) -> Any:
    rows_per_chunk = max(1, min(len(rows), _CHUNK_BYTES // (rows.dim * np.dtype(rows.dtype).itemsize)))
    return group.create_dataset(name, (len(rows), rows.dim), rows.dtype, chunks=(rows_per_chunk, rows.dim))


def _create_strings(group: Any, name: str, length: int) -> Any:
    import h5py

    return group.create_dataset(name, (length,), h5py.string_dtype())


def _create_index(group: Any, length: int) -> Any:
    """Make `group` one of anndata's data frames without columns, and return its index."""
    _encode(group, "dataframe", "0.2.0")
    group.attrs.update({"_index": "_index", "column-order": np.array([], dtype=float)})
    return _encode(_create_strings(group, "_index", length), "string-array", "0.2.0")


def _encode(element: Any, kind: str, version: str) -> Any:
    """Say what an element of an AnnData file is."""
    element.attrs.update({"encoding-type": kind, "encoding-version": version})
    return element


def _fill(file: Hdf5File, matrix: Any, names: Any, rows: Rows) -> None:
    start = 0
    for ids, values in rows.batches():
        span = slice(start, start + len(ids))
        matrix[span], names[span] = values, ids
        file.require_sound()
        start = span.stop


def _placed_tensors(rows: Rows) -> Iterator[tuple[int, str, Tensor]]:
    for ordinals, ids, values in rows.placed():
        yield from zip(ordinals, ids, _tensors(values), strict=True)


def _tensors(values: Values) -> Iterator[Tensor]:
    """Rows as tensors that own their memory: torch.save writes all of the memory of which a tensor is a part."""
    import torch

    for row in torch.from_numpy(values):
        yield row.clone()


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
