"""Fused operations, one per file: public function, PyTorch reference, schema and backends.

`__all__` is what is public. The ops that end in `_unchecked` skip the checks of their arguments:
they are fastdiff's own, for loops that have checked them once.
"""

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
from .multistep_step import allocate_slots, multistep_step, multistep_step_ref, seeded_noise
from .multistep_step import multistep_step_unchecked as multistep_step_unchecked
from .spectral_filter import spectral_filter, spectral_filter_ref
from .spectral_operators import SpectralGains, SpectralResponse
from .spectral_update import spectral_langevin, spectral_predictor, spectral_update_ref
from .spectral_update import spectral_update_unchecked as spectral_update_unchecked
from .weighted_sums import weighted_sums, weighted_sums_ref
from .weighted_sums import weighted_sums_unchecked as weighted_sums_unchecked

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
    "seeded_noise",
    "spectral_filter",
    "spectral_filter_ref",
    "spectral_langevin",
    "spectral_predictor",
    "spectral_update_ref",
    "weighted_sums",
    "weighted_sums_ref",
]
