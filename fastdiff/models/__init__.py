"""Networks of our own: the reference UNet, the committed digits and photographs models."""

from fastdiff.models.digits import (
    DigitFeatures,
    load_digits,
    load_digits_features,
    load_digits_reference,
)
from fastdiff.models.photographs import NoiseConditional, load_photographs
from fastdiff.models.unet import UNet, UNetConfig

__all__ = [
    "DigitFeatures",
    "NoiseConditional",
    "UNet",
    "UNetConfig",
    "load_digits",
    "load_digits_features",
    "load_digits_reference",
    "load_photographs",
]
