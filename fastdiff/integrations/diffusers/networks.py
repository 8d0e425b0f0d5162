"""diffusers' networks: UNets, and one flow-matching transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.denoisers import NetworkDenoiser, named, uncompiled, unpacked

UNETS = ("UNet2DModel", "UNet2DConditionModel")


class DiffusersUNet(NetworkDenoiser):
    """UNet2DModel, or UNet2DConditionModel with all that its own forward takes.

    Conditioning goes by diffusers' names: `class_labels`, and for the second class
    `encoder_hidden_states` (required), `added_cond_kwargs`, `cross_attention_kwargs`, ...
    """

    usual_prediction = "epsilon"

    @staticmethod
    def recognises(network: Any) -> bool:
        return named(network, "diffusers", *UNETS)

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        config = uncompiled(self.network).config
        _check_channels(config, x)
        if "cross_attention_dim" in config and "encoder_hidden_states" not in conditioning:
            raise ValueError(
                "encoder_hidden_states must be given: this UNet2DConditionModel attends to "
                f"text embeddings [B, L, {config['cross_attention_dim']}]; got "
                f"{', '.join(conditioning) or 'no conditioning'}"
            )
        return unpacked(self.network(x, t, return_dict=False, **conditioning))


class FlowTransformer(NetworkDenoiser):
    """SD3Transformer2DModel: predicts the velocity of a rectified flow, epsilon - x0.

    Conditioning goes by diffusers' names: `encoder_hidden_states` [B, L, D] and
    `pooled_projections` [B, P]. Its schedule is `from_diffusers` of its scheduler, which has the
    shift and the times it was trained on.
    """

    usual_prediction, only_prediction = "flow", True

    @staticmethod
    def recognises(network: Any) -> bool:
        return named(network, "diffusers", "SD3Transformer2DModel")

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        _check_channels(uncompiled(self.network).config, x)
        for name in ("encoder_hidden_states", "pooled_projections"):
            if name not in conditioning:
                raise ValueError(
                    f"{name} must be given; got {', '.join(conditioning) or 'no conditioning'}"
                )
        return unpacked(
            self.network(hidden_states=x, timestep=t, return_dict=False, **conditioning)
        )


def read_configs(folder: str | Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Of a local folder: where its UNet is, and the configurations of that and of its scheduler.

    The folder is what `save_pretrained` of a pipeline writes (unet/ and scheduler/), or a UNet with
    its config.json beside a scheduler_config.json. Nothing is downloaded.
    Raises FileNotFoundError for a folder that is not there or lacks one of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model must be a local diffusers folder; there is none: {folder}")
    unet = _config(folder, "unet", "config.json")
    scheduler = _config(folder, "scheduler", "scheduler_config.json")
    return unet.parent, json.loads(unet.read_text()), json.loads(scheduler.read_text())


def load_diffusers(folder: str | Path) -> tuple[DiffusersUNet, dict[str, Any]]:
    """The wrapped UNet of a folder (see `read_configs`), and its scheduler's configuration.

    Eval mode, no gradients. Raises ValueError for another network.
    """
    path, fields, scheduler = read_configs(folder)
    kind = fields.get("_class_name")
    if kind not in UNETS:
        raise ValueError(f"model must be a {' or '.join(UNETS)}; {path} holds a {kind}")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("a diffusers folder needs the package diffusers") from error
    unet = getattr(diffusers, kind).from_pretrained(path, local_files_only=True)
    return DiffusersUNet(unet.eval().requires_grad_(False), None, scheduler), scheduler


def _check_channels(config: Any, x: Tensor) -> None:
    wanted = config["in_channels"]
    if x.ndim != 4 or x.shape[1] != wanted:
        raise ValueError(
            f"noise must be [B, {wanted}, H, W] for this network; got {tuple(x.shape)}"
        )


def _config(folder: Path, part: str, name: str) -> Path:
    for path in (folder / part / name, folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"model must be a diffusers folder with {part}/{name} or {name}; {folder} has neither"
    )
