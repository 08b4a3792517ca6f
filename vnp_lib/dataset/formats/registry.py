"""The export formats by name."""

from __future__ import annotations

import dataclasses

from vnp_lib.dataset.formats.base import Format
from vnp_lib.dataset.formats.hdf5 import write_h5ad, write_hdf5, write_hdf5_uniprot
from vnp_lib.dataset.formats.numpy_files import write_csv, write_npy, write_npz, write_ragged_npz
from vnp_lib.dataset.formats.safetensors import write_ragged_safetensors, write_safetensors
from vnp_lib.dataset.formats.torch_files import write_esm_extract, write_virnucpro
from vnp_lib.plan import StoreDtype

FORMATS = {
    "npy": Format(
        write=write_npy,
        about="NumPy: a matrix (N, D), and NAME.ids.txt with one id per line; for faiss and memory "
        "maps",
        suffixes=(".npy",),
        has_ids_file=True,
        read="""
import numpy as np
embeddings = np.load({path!r}, mmap_mode="r")
with open({ids_path!r}, encoding="utf-8") as lines:
    ids = lines.read().splitlines()
""",
    ),
    "npz": Format(
        write=write_npz,
        about="NumPy: the arrays `ids` and `embeddings` in one file; reading loads all into memory",
        suffixes=(".npz",),
        read="""
import numpy as np
arrays = np.load({path!r})
ids, embeddings = arrays["ids"], arrays["embeddings"]
""",
    ),
    "csv": Format(
        write=write_csv,
        about="text: the columns `id`, `dim_0`, ...; three times the size of the dataset, for "
        "small ones",
        suffixes=(".csv",),
        bytes_per_value=13,
        num_rows_advised=100_000,
        read="""
import pandas as pd
table = pd.read_csv(
    {path!r},
    dtype={{"id": str}},
    keep_default_na=False,
    index_col="id",
    float_precision="round_trip",
)
ids, embeddings = list(table.index), table.to_numpy("float32")
""",
    ),
    "hdf5": Format(
        write=write_hdf5,
        about="HDF5: the datasets `embeddings` (N, D) and `sequence_ids`, as in virnucpro-broad",
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
        about="HDF5: a dataset (D,) per accession, as in UniProt's downloads; up to a million "
        "sequences",
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
        about="a directory of output_1_ESM.pt, ..., for VirNucPro's merge step; 10,000 sequences "
        "per file, float32",
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
        about="a directory of HEADER.pt, as fair-esm's extract.py writes them, with all columns; "
        "up to a million",
        holds_several=True,
        # A small file takes whole blocks of 4 KiB.
        bytes_per_row=6_000,
        num_rows_advised=1_000_000,
        read="""
import torch
from pathlib import Path
files = [torch.load(path) for path in Path({path!r}).rglob("*.pt")]
embeddings = {{file.pop("label"): file for file in files}}
""",
    ),
}

# For per-residue outputs.
RAGGED_FORMATS = {
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
