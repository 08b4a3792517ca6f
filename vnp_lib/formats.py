"""The formats in which a dataset can be exported, each as its readers expect it.

Every writer takes the rows a batch at a time, so that memory does not grow with their number, and leaves its file or
directory whole or not at all. Errors of the disk come out as OSError.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, groupby
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import DTypeLike, NDArray

from vnp_lib.dataset import EmbeddingDataset, as_rows
from vnp_lib.errors import ConfigError
from vnp_lib.extract_files import extract_file
from vnp_lib.hdf5 import Hdf5File, open_hdf5
from vnp_lib.plan.outputs import Output, OutputKind, StoreDtype, Values, as_stored, offsets_of
from vnp_lib.storage import durable
from vnp_lib.storage.durable import durable_directory, durable_file, durable_path, path_below

if TYPE_CHECKING:  # it takes seconds to import, and most formats do without
    from torch import Tensor

_BATCH_BYTES = 16 * 1024**2  # of embeddings, at a time
_CHUNK_BYTES = 1024**2  # of an HDF5 dataset: what is read to get at one row
_BATCH_IDS = 65_536
_VIRNUCPRO_FILE_SEQUENCES = 10_000
_IN_SAFETENSORS = {"int64": "I64", "int32": "I32", "float32": "F32", "float16": "F16", "uint8": "U8"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is to be exported: columns of a dataset, its rows in input order."""

    dataset: EmbeddingDataset
    columns: tuple[str, ...]  # one, but for a format that holds several
    dtype: StoreDtype

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def dim(self) -> int:
        return self.dataset.dim

    @property
    def outputs(self) -> tuple[Output, ...]:
        return tuple(self.dataset.columns[column] for column in self.columns)

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing but vectors."""
        return all(output.is_fixed for output in self.outputs)

    @property
    def about(self) -> dict[str, str]:
        """What the one column is of: model, layer if it is of one, pooling, dtype of the computation, fingerprint of the run."""
        (output,) = self.outputs
        identity = self.dataset.metadata["identity"]
        of_a_layer = {} if output.layer is None else {"layer": str(output.layer)}
        return {
            "model": str(identity["model"]),
            **of_a_layer,
            "pooling": output.kind.value,
            "dtype": str(identity["dtype"]),
            "fingerprint": str(self.dataset.metadata["fingerprint"]),
        }

    @property
    def num_values(self) -> int:
        if self.is_fixed:  # which says it without looking at each of many millions
            return len(self) * len(self.columns) * self.dim
        return sum(int(output.widths(self.lengths, self.dim).sum()) for output in self.outputs)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Residues, (N,)."""
        batches = self.dataset.record_batches(_BATCH_IDS, ["length"])
        return np.concatenate([np.empty(0, dtype=np.int32), *(batch.column("length").to_numpy() for batch in batches)])

    @cached_property
    def id_width(self) -> int:
        """Characters of the longest id, and 1 at least: NumPy takes 0 for any number."""
        return max((len(sequence_id) for ids in self.ids() for sequence_id in ids), default=1)

    def ids(self) -> Iterator[list[str]]:
        for batch in self.dataset.record_batches(_BATCH_IDS, ["id"]):
            yield _ids(batch)

    def batches(self) -> Iterator[tuple[list[str], Values]]:
        """Ids and vectors, (n, dim), of the one column."""
        for batch in self._batches("id"):
            ids = _ids(batch)
            yield ids, self._vectors(ids, batch)

    def placed(self) -> Iterator[tuple[list[int], list[str], Values]]:
        """Positions in the input, from 0, ids and vectors, (n, dim), of the one column."""
        for batch in self._batches("ordinal", "id"):
            ids = _ids(batch)
            yield batch.column("ordinal").to_pylist(), ids, self._vectors(ids, batch)

    def arrays(self) -> Iterator[tuple[list[str], Sequence[Values]]]:
        """Ids and arrays, each in its shape, of the one column."""
        (column,) = self.columns
        for batch in self._batches("id", "length"):
            ids = _ids(batch)
            yield ids, self._arrays(ids, batch, column)

    def headed(self) -> Iterator[tuple[str, dict[Output, Values]]]:
        """Each sequence's FASTA header without ">", one space between id and description, and its arrays, in their shapes."""
        for batch in self._batches("id", "description", "length"):
            ids = _ids(batch)
            arrays = [self._arrays(ids, batch, column) for column in self.columns]
            for id_, description, *own in zip(ids, batch.column("description").to_pylist(), *arrays, strict=True):
                yield f"{id_} {description}".rstrip(), dict(zip(self.outputs, own, strict=True))

    def _batches(self, *beside: str) -> Iterator[pa.RecordBatch]:
        """The columns, and others beside them."""
        columns = [*beside, *self.columns]
        if not self.is_fixed:
            return self.dataset.row_groups(columns)
        return self.dataset.record_batches(max(1, _BATCH_BYTES // (4 * self.dim * len(self.columns))), columns)

    def _vectors(self, ids: list[str], batch: pa.RecordBatch) -> Values:
        (column,) = self.columns
        return self._as_stored(ids, as_rows(batch.column(column)))

    def _arrays(self, ids: list[str], batch: pa.RecordBatch, column: str) -> Sequence[Values]:
        arrays = self.dataset.arrays_in(batch, column)
        if isinstance(arrays, np.ndarray):
            return list(self._as_stored(ids, arrays))
        flat = (self._as_stored([id_], array.reshape(1, -1)) for id_, array in zip(ids, arrays, strict=True))
        return [values.reshape(array.shape) for values, array in zip(flat, arrays, strict=True)]

    def _as_stored(self, ids: list[str], rows: NDArray[np.float32]) -> Values:
        """Rows, (n, W), in the precision that is wanted."""
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
    holds_several: bool = False  # columns; others hold one
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
        return rows.num_values * bytes_per_value + len(rows) * self.bytes_per_row


def write_npy(rows: Rows, path: Path, replace: bool) -> None:
    """One matrix, (N, D), and beside it the ids, a line each. The matrix is never there without its own ids."""
    ids_path = ids_beside(path)
    with durable_file(path, replace=replace) as matrix, durable_file(ids_path, replace=replace) as lines:
        _write_npy_header(matrix, (len(rows), rows.dim), rows.dtype)
        for ids, values in rows.batches():
            matrix.write(values.data)
            lines.write("".join(f"{sequence_id}\n" for sequence_id in ids).encode())
        if replace and path.exists():
            durable.ops.unlink(path)
            durable.fsync_directory(path.parent)


def ids_beside(path: Path) -> Path:
    """Where the ids of a `.npy` file are: `x.ids.txt` beside `x.npy`."""
    return path.with_name(path.name.removesuffix(".npy") + ".ids.txt")


def write_npz(rows: Rows, path: Path, replace: bool) -> None:
    """The arrays `ids` and `embeddings`, uncompressed."""
    _write_npz(path, [_fixed_width_ids(rows), _matrix(rows)], replace)


def write_ragged_npz(rows: Rows, path: Path, replace: bool) -> None:
    """The arrays `ids`, `values`, `offsets` and `lengths`, uncompressed, as `_ragged` has them."""
    _write_npz(path, [_fixed_width_ids(rows), *_ragged(rows)], replace)


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
    """A dataset for each accession, (D,), or (L, D) where residues have their own, all at the root."""
    with durable_path(path, replace=replace) as temporary, open_hdf5(temporary) as file:
        _describe(file.root, rows)
        for ids, arrays in rows.arrays():
            for sequence_id, array in zip(ids, arrays, strict=True):
                file.root.create_dataset(_key(sequence_id, taken=file.root), data=array, track_times=False)
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
    _write_safetensors(path, [*_utf8_ids(rows), _matrix(rows)], rows.about, replace)


def write_ragged_safetensors(rows: Rows, path: Path, replace: bool) -> None:
    """The tensors `values`, `offsets` and `lengths`, as `_ragged` has them, and `ids` and `id_offsets` as in other exports."""
    _write_safetensors(path, [*_utf8_ids(rows), *_ragged(rows)], rows.about, replace)


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
    """`{header}.pt` for each sequence, as fair-esm's scripts/extract.py writes it, with all columns.

    Each is what `extract_file` makes of it. As there, a "/" in the header makes directories; what would lead elsewhere is
    refused.
    """
    with durable_directory(path, replace=replace) as directory:
        for header, arrays in rows.headed():
            target = _path_of(header, directory)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _save(extract_file(header, {output: _tensor(array) for output, array in arrays.items()}), target)
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
        about="a directory with HEADER.pt for each sequence, as fair-esm's extract.py writes, all columns; up to a million",
        holds_several=True,
        bytes_per_row=6_000,  # blocks of 4 KiB
        num_rows_advised=1_000_000,
        read="""
import torch
from pathlib import Path
files = [torch.load(path) for path in Path({path!r}).rglob("*.pt")]
embeddings = {{file.pop("label"): file for file in files}}
""",
    ),
}

RAGGED_FORMATS = {  # for what is as long as its sequence
    "npz": dataclasses.replace(
        FORMATS["npz"],
        write=write_ragged_npz,
        read="""
import numpy as np
from itertools import pairwise
arrays = np.load({path!r})
ids, values, lengths = arrays["ids"], arrays["values"], arrays["lengths"]
spans = zip(pairwise(arrays["offsets"]), lengths)
embeddings = [values[start:stop].reshape(length, -1) for (start, stop), length in spans]
""",
    ),
    "hdf5-uniprot": FORMATS["hdf5-uniprot"],
    "safetensors": dataclasses.replace(
        FORMATS["safetensors"],
        write=write_ragged_safetensors,
        read="""
from itertools import pairwise
from safetensors import safe_open
with safe_open({path!r}, framework="pt") as file:
    values, lengths = file.get_tensor("values"), file.get_tensor("lengths").tolist()
    spans = zip(pairwise(file.get_tensor("offsets").tolist()), lengths)
    id_spans = pairwise(file.get_tensor("id_offsets").tolist())
    text = file.get_tensor("ids").numpy().tobytes()
ids = [text[start:stop].decode() for start, stop in id_spans]
embeddings = [values[start:stop].reshape(length, -1) for (start, stop), length in spans]
""",
    ),
    "esm-extract": FORMATS["esm-extract"],
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streamed:
    """An array that is written piece by piece."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Iterable[NDArray[Any]]  # end to end, they are its values

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _matrix(rows: Rows) -> _Streamed:
    """`embeddings`, (N, D)."""
    pieces = (values for _, values in rows.batches())
    return _Streamed(name="embeddings", dtype=np.dtype(rows.dtype), shape=(len(rows), rows.dim), pieces=pieces)


def _ragged(rows: Rows) -> list[_Streamed]:
    """`values`, `offsets`, int64 (N + 1,), where those of each sequence begin and end, and `lengths`, int32 (N,), residues.

    `values` has a row for each residue, (R, D), of all sequences; of contacts, which are as wide as they are long, a number
    for each pair of residues, (P,). So `values[offsets[i]:offsets[i + 1]].reshape(lengths[i], -1)` is in shape.
    """
    (output,) = rows.outputs
    is_square = output.kind == OutputKind.CONTACTS
    offsets = offsets_of(rows.lengths.astype(np.int64) ** (2 if is_square else 1))
    width = () if is_square else output.shape(1, rows.dim)[1:]
    values = (array for _, arrays in rows.arrays() for array in arrays)
    return [
        _whole("offsets", offsets),
        _whole("lengths", rows.lengths),
        _Streamed(name="values", dtype=np.dtype(rows.dtype), shape=(int(offsets[-1]), *width), pieces=values),
    ]


def _fixed_width_ids(rows: Rows) -> _Streamed:
    dtype = np.dtype(f"<U{rows.id_width}")
    pieces = (np.array(ids, dtype=dtype) for ids in rows.ids())
    return _Streamed(name="ids", dtype=dtype, shape=(len(rows),), pieces=pieces)


def _utf8_ids(rows: Rows) -> list[_Streamed]:
    widths = (len(sequence_id.encode()) for ids in rows.ids() for sequence_id in ids)
    offsets = offsets_of(np.fromiter(widths, dtype=np.int64, count=len(rows)))
    pieces = (np.frombuffer("".join(ids).encode(), dtype=np.uint8) for ids in rows.ids())
    return [
        _whole("id_offsets", offsets),
        _Streamed(name="ids", dtype=np.dtype(np.uint8), shape=(int(offsets[-1]),), pieces=pieces),
    ]


def _whole(name: str, array: NDArray[Any]) -> _Streamed:
    return _Streamed(name=name, dtype=array.dtype, shape=array.shape, pieces=[array])


def _write_npz(path: Path, arrays: Sequence[_Streamed], replace: bool) -> None:
    with durable_file(path, replace=replace) as file, zipfile.ZipFile(file, "w") as archive:
        for array in arrays:
            with archive.open(f"{array.name}.npy", "w", force_zip64=True) as member:
                _write_npy_header(member, array.shape, array.dtype)
                for piece in array.pieces:
                    member.write(piece.data)


def _write_safetensors(path: Path, tensors: Sequence[_Streamed], about: dict[str, str], replace: bool) -> None:
    aligned = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # the widest first: so they all are
    with durable_file(path, replace=replace) as file:
        file.write(_safetensors_header(aligned, about))
        for tensor in aligned:
            for piece in tensor.pieces:
                file.write(piece.data)


def _safetensors_header(tensors: Sequence[_Streamed], about: dict[str, str]) -> bytes:
    """Of tensors that lie end to end. The length comes first, then JSON, a multiple of 8."""
    ends = list(accumulate(tensor.size_bytes for tensor in tensors))
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"} | about}
    for tensor, start, end in zip(tensors, chain([0], ends), ends, strict=False):
        fields[tensor.name] = {
            "dtype": _IN_SAFETENSORS[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
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
    chunks = (rows_per_chunk, rows.dim) if len(rows) else None  # a chunk may not be larger than the whole
    return group.create_dataset(name, (len(rows), rows.dim), rows.dtype, chunks=chunks)


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
