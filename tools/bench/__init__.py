"""Measurements for the developers of this project, one script each: `python -m tools.bench.NAME --help`."""
