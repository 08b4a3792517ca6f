"""User input: find the files, read their records, check them against the policies."""
