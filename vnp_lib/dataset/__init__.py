"""The dataset that users read: its Parquet files, and exports to other formats."""

from __future__ import annotations

from vnp_lib.dataset.reader import EmbeddingDataset, open_dataset

__all__ = ["EmbeddingDataset", "open_dataset"]
