"""The formats to which a dataset is exported."""
