"""A run directory: open it, resolve its settings, find the work left, record attempts, assemble the dataset."""
