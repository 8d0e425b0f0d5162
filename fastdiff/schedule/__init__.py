"""Noise schedules in float64, and the times that a sampler visits."""

from fastdiff.schedule.schedule import (
    CONVENTIONS,
    SPACINGS,
    Array,
    NoiseSchedule,
    namespace,
    plain,
    wide,
)

__all__ = ["CONVENTIONS", "SPACINGS", "Array", "NoiseSchedule", "namespace", "plain", "wide"]
