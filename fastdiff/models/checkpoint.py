"""A denoiser as a file: a network's weights, how it is built, what it predicts, its schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.files import read_tensors, write_tensors
from fastdiff.models.noise_conditional import NoiseConditional
from fastdiff.models.unet import UNet
from fastdiff.prediction import prediction as prediction_of
from fastdiff.schedule import NoiseSchedule

FORMAT = "fastdiff denoiser 1"
NETWORK = "network."  # what the weights' names begin with in the file

# Kinds of networks, each with what builds one of its settings.
NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": UNet.from_settings,
    "noise_conditional": NoiseConditional.from_settings,
}


class DenoiserFile(NamedTuple):
    """What `read_denoiser` finds.

    Attributes:
        network: float32, in eval mode, without gradients.
        prediction: what it predicts, one of `fastdiff.PREDICTIONS`.
        schedule: what it was trained with.
        words: all metadata of the file.
        others: its tensors that are not the network's.
    """

    network: Any
    prediction: str
    schedule: NoiseSchedule
    words: dict[str, Any]
    others: dict[str, Tensor]


def write_denoiser(
    path: Path,
    kind: str,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    prediction: str,
    schedule: tuple[str, dict[str, Any]],
    words: dict[str, Any],
    others: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a denoiser as safetensors, its metadata also as JSON beside it; returns the metadata.

    kind, settings: of `NETWORKS`. schedule: the class method of `NoiseSchedule` that makes it, and
    its arguments. words: how it came about, as JSON knows it. others: further tensors.
    """
    metadata = {
        "format": FORMAT,
        "network": {"kind": kind, "settings": settings},
        "prediction": prediction_of(prediction).name,
        "schedule": {"kind": schedule[0], "arguments": schedule[1]},
        **words,
    }
    tensors = {f"{NETWORK}{name}": value for name, value in weights.items()} | (others or {})
    write_tensors(path, tensors, metadata, beside=True)
    return metadata


def read_denoiser(path: Path | str) -> DenoiserFile:
    """What `write_denoiser` wrote; weights of half precision come as float32.

    Raises ValueError for another file, and for weights that do not fit their network.
    """
    tensors, words = read_tensors(path)
    if words.get("format") != FORMAT:
        raise ValueError(f"{path} must be of the format {FORMAT!r}; got {words.get('format')!r}")
    kind, schedule = words["network"]["kind"], words["schedule"]
    if kind not in NETWORKS:
        raise ValueError(f"{path} must hold one of {', '.join(NETWORKS)}; got {kind!r}")
    network = NETWORKS[kind](words["network"]["settings"])
    weights = {k.removeprefix(NETWORK): v.float() for k, v in tensors.items() if _of_network(k)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its network: {error}") from None
    made = getattr(NoiseSchedule, schedule["kind"])(**schedule["arguments"])
    others = {name: value for name, value in tensors.items() if not _of_network(name)}
    network.eval().requires_grad_(False)
    return DenoiserFile(network, words["prediction"], made, words, others)


def _of_network(name: str) -> bool:
    return name.startswith(NETWORK)
