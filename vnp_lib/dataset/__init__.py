"""The dataset that users read: its Parquet files, and exports to other formats."""

from __future__ import annotations

from vnp_lib.dataset.export import export_dataset
from vnp_lib.dataset.formats.registry import FORMATS, RAGGED_FORMATS
from vnp_lib.dataset.formats.torch_files import extract_file
from vnp_lib.dataset.reader import (
    DATASET_SCHEMA,
    SUCCESS_NAME,
    EmbeddingDataset,
    OutputBatch,
    Row,
    RowBatch,
    describe_rows,
    footer_of,
    open_dataset,
    read_success,
    stored_dtype,
    verify_dataset,
)
from vnp_lib.dataset.schema import columns_of, fields_of

__all__ = [
    "DATASET_SCHEMA",
    "FORMATS",
    "RAGGED_FORMATS",
    "SUCCESS_NAME",
    "EmbeddingDataset",
    "OutputBatch",
    "Row",
    "RowBatch",
    "columns_of",
    "describe_rows",
    "export_dataset",
    "extract_file",
    "fields_of",
    "footer_of",
    "open_dataset",
    "read_success",
    "stored_dtype",
    "verify_dataset",
]
