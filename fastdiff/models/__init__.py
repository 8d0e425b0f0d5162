"""Networks of our own: the reference UNet, the committed digits and photographs models."""

from fastdiff.models.checkpoint import DenoiserFile, read_denoiser, write_denoiser
from fastdiff.models.digits import (
    DigitFeatures,
    load_digits,
    load_digits_features,
    load_digits_reference,
)
from fastdiff.models.noise_conditional import NoiseConditional
from fastdiff.models.photographs import load_photographs
from fastdiff.models.unet import UNet, UNetConfig

__all__ = [
    "DenoiserFile",
    "DigitFeatures",
    "NoiseConditional",
    "UNet",
    "UNetConfig",
    "load_digits",
    "load_digits_features",
    "load_digits_reference",
    "load_photographs",
    "read_denoiser",
    "write_denoiser",
]
