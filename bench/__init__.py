"""Measurements, from a source checkout: `python -m bench gpu`, `... bench cpu`, `... bench.aot`."""
