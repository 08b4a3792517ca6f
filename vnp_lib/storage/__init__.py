"""Durable files, locks, and what the file system below them can do."""
