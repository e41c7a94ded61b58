"""Validation on a GPU in four parts; see `python -m bench.gpu --help`."""
