"""What is claimed, measured: each prints a table, and one JSON line last. ``python -m benchmarks.NAME``."""
