"""Benchmarks: `pytest bench/ --benchmark-only`. Nothing here is installed with the package."""
