"""The formats that a dataset is exported to."""
