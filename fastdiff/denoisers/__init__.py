"""Networks as other projects build them, behind the one call that the sampler makes.

A family is a file with a subclass of `NetworkDenoiser` and a place in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdiff.denoisers.diffusers import DiffusersUNet, FlowTransformer
from fastdiff.denoisers.edm import EDMNetwork
from fastdiff.denoisers.k_diffusion import KDiffusionDenoiser
from fastdiff.denoisers.network import NetworkDenoiser
from fastdiff.prediction import Prediction
from fastdiff.schedule import NoiseSchedule

__all__ = [
    "FAMILIES",
    "DiffusersUNet",
    "EDMNetwork",
    "FlowTransformer",
    "KDiffusionDenoiser",
    "NetworkDenoiser",
    "wrap",
]

FAMILIES: tuple[type[NetworkDenoiser], ...] = (
    DiffusersUNet,
    FlowTransformer,
    EDMNetwork,
    KDiffusionDenoiser,
)


def wrap(
    network: Callable[..., Any],
    *,
    prediction: str | Prediction | None = None,
    schedule: NoiseSchedule | Any | None = None,
) -> NetworkDenoiser:
    """Make a denoiser of a network: what it predicts and how it is called come with it.

    Known families: diffusers' UNet2DModel and UNet2DConditionModel, its SD3Transformer2DModel (flow
    matching), EDM's preconditioned networks, k-diffusion's denoisers. Anything else is called as
    `network(x [B, C, H, W], t [B], **conditioning)` and may return a tensor, a tuple whose first
    entry is one, or something with a `sample` in it.

    Args:
        network: the network; it is neither changed nor moved, nor put into eval mode.
        prediction: one of `fastdiff.PREDICTIONS` or a `Prediction`. None: the family's own
            (diffusers' UNets: epsilon); a network of no known family has to be given one.
        schedule: a `NoiseSchedule`, or a diffusers scheduler, whose prediction type is taken too.
            None: EDM networks and k-diffusion denoisers that hold their sigmas bring one, for all
            others `Sampler` is given it.

    Raises:
        TypeError: not callable, or something that is no schedule.
        ValueError: a prediction that is unknown, missing, or not the family's or the scheduler's.
    """
    if isinstance(network, NetworkDenoiser):
        raise TypeError("network is wrapped already; give what it wraps, its .network")
    if not callable(network):
        raise TypeError(f"network must be callable; got {type(network).__name__}")
    for family in FAMILIES:
        if family.recognises(network):
            return family(network, prediction, schedule)
    return NetworkDenoiser(network, prediction, schedule)
