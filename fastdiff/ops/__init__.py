"""Fused operations, one per file: public function, PyTorch reference, schema and backends."""

from .multistep_step import (
    allocate_slots,
    multistep_step,
    multistep_step_ref,
    multistep_step_unchecked,
    seeded_noise,
)

__all__ = [
    "allocate_slots",
    "multistep_step",
    "multistep_step_ref",
    "multistep_step_unchecked",
    "seeded_noise",
]
