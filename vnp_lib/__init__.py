"""ESM-2 embeddings of millions of proteins, computed shard by shard on machines that can vanish at any moment."""

__version__ = "0.1.0"
