"""Networks of our own: the reference UNet and the committed digits model."""

from fastdiff.models.digits import (
    DigitFeatures,
    load_digits,
    load_digits_features,
    load_digits_reference,
)
from fastdiff.models.unet import UNet, UNetConfig

__all__ = [
    "DigitFeatures",
    "UNet",
    "UNetConfig",
    "load_digits",
    "load_digits_features",
    "load_digits_reference",
]
