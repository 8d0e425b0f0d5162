"""diffusers' schedulers, read: noise levels, prediction and clipping of one, or of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastdiff.schedule import NoiseSchedule


def config_of(scheduler: Any) -> Mapping[str, Any] | None:
    """A scheduler's configuration, or the one given; None for anything else."""
    config = getattr(scheduler, "config", scheduler)
    return config if isinstance(config, Mapping) else None


def _class_name(scheduler: Any, config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name") or type(scheduler).__name__)


def schedule_of(scheduler: Any) -> NoiseSchedule | None:
    """The noise levels of a scheduler or of its config; None for what is neither.

    Raises TypeError for a scheduler without betas, alphas_cumprod, sigmas or flow matching.
    """
    config = config_of(scheduler)
    if config is None:
        return None
    name = _class_name(scheduler, config)
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        count: Any = config.get("num_train_timesteps", 1000)
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return replace(NoiseSchedule.flow(shift), last=1.0 / count, time_scale=float(count))
    if "ScoreSdeVe" in name:
        return NoiseSchedule.ve(config["sigma_min"], config["sigma_max"])
    if "EDM" in name:
        return NoiseSchedule.edm(config["sigma_min"], config["sigma_max"])
    start: Any = config.get("beta_start")
    end: Any = config.get("beta_end")
    count = config.get("num_train_timesteps")
    kind = config.get("beta_schedule")
    if config.get("trained_betas") is not None:
        schedule = NoiseSchedule.from_betas(config["trained_betas"])
    elif kind == "linear":
        schedule = NoiseSchedule.linear_beta(start, end, count)
    elif kind == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear_beta(start, end, count)
    elif kind == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(count)
    elif hasattr(scheduler, "alphas_cumprod"):
        schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    else:
        raise TypeError(
            "scheduler must be a diffusers scheduler with betas, alphas_cumprod, sigmas or "
            f"flow matching; got {name}"
        )
    if config.get("rescale_betas_zero_snr"):
        # Lin et al. 2023, algorithm 1: shift and scale sqrt(alpha-bar) so that it ends at zero.
        root = schedule.alpha(np.arange(count, dtype=float))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        schedule = NoiseSchedule.from_alphas_cumprod(root**2)
    return replace(schedule, spacing=config.get("timestep_spacing", schedule.spacing))


def prediction_of(scheduler: Any) -> str | None:
    """What the network beside a scheduler (or its config) predicts, in our names.

    Raises ValueError for EDM's schedulers, which do the network's preconditioning themselves.
    """
    config = config_of(scheduler)
    if config is None:
        return None
    name = _class_name(scheduler, config)
    if "EDM" in name:
        raise ValueError(
            f"schedule must be of a network that is called with the state as it is; {name} "
            "preconditions its network: wrap a function that does so, with NoiseSchedule.edm"
        )
    if "ScoreSdeVe" in name:
        return "score"
    if "FlowMatch" in name:
        return "flow"
    kind = str(config.get("prediction_type", "epsilon"))
    return {"flow_prediction": "flow"}.get(kind, kind)


def tableau_options(scheduler: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """What else of a scheduler (or its config) a tableau takes: the clipping.

    Raises ValueError for dynamic thresholding, unless the given options ask for it.
    """
    config = config_of(scheduler)
    if config is None:
        return None
    if config.get("thresholding") and given.get("dynamic_threshold") is None:
        raise ValueError(
            "scheduler must be without thresholding; give dynamic_threshold= and clip= instead"
        )
    bound = config.get("clip_sample_range", 1.0)
    return {"clip": bound} if config.get("clip_sample") else {}
