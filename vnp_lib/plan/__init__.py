"""Decide what a run computes: its outputs, sequences, windows, shards and batches."""
