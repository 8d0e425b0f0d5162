"""Measurements, from a source checkout: `python -m bench`, `... bench gpu`, `... bench.aot`."""
