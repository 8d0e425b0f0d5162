"""Fused operations, one per file: public function, PyTorch reference, schema and backends."""

from . import haar_orders
from .haar import (
    HaarPyramid,
    haar_expand,
    haar_loss,
    haar_merge,
    haar_noise,
    haar_split,
    haar_step,
)
from .multistep_step import (
    allocate_slots,
    multistep_step,
    multistep_step_ref,
    multistep_step_unchecked,
    seeded_noise,
)
from .spectral_filter import SpectralResponse, spectral_filter, spectral_filter_ref
from .spectral_update import (
    SpectralGains,
    spectral_langevin,
    spectral_predictor,
    spectral_update_ref,
    spectral_update_unchecked,
)
from .weighted_sums import weighted_sums, weighted_sums_ref, weighted_sums_unchecked

__all__ = [
    "HaarPyramid",
    "SpectralGains",
    "SpectralResponse",
    "allocate_slots",
    "haar_expand",
    "haar_loss",
    "haar_merge",
    "haar_noise",
    "haar_orders",
    "haar_split",
    "haar_step",
    "multistep_step",
    "multistep_step_ref",
    "multistep_step_unchecked",
    "seeded_noise",
    "spectral_filter",
    "spectral_filter_ref",
    "spectral_langevin",
    "spectral_predictor",
    "spectral_update_ref",
    "spectral_update_unchecked",
    "weighted_sums",
    "weighted_sums_ref",
    "weighted_sums_unchecked",
]
