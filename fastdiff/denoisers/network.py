"""Networks behind the one call that the sampler makes; families add what they know of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastdiff.frameworks import first_answer
from fastdiff.prediction import Prediction
from fastdiff.prediction import prediction as prediction_of
from fastdiff.schedule import NoiseSchedule


class NetworkDenoiser(nn.Module):
    """A network as the sampler calls it: (x [B, C, H, W], t [B], **conditioning) -> tensor.

    Attributes:
        network: what was wrapped.
        prediction: what it predicts.
        schedule: the noise levels it was trained with, or None where that has to be said.
    """

    usual_prediction: str | None = None  # of the family
    only_prediction = False  # whether the family can predict nothing else

    def __init__(
        self, network: Callable[..., Any], prediction: str | Prediction | None, schedule: Any
    ) -> None:
        super().__init__()
        if schedule is not None and not isinstance(schedule, NoiseSchedule):
            scheduler = schedule
            known = first_answer(lambda framework: framework.prediction(scheduler))
            if known is None:
                raise TypeError(
                    "schedule must be a fastdiff.NoiseSchedule or a diffusers scheduler; "
                    f"got {type(schedule).__name__}"
                )
            prediction = _agreed(prediction, known)
            schedule = NoiseSchedule.from_diffusers(scheduler)
        if self.only_prediction and self.usual_prediction is not None:
            prediction = _agreed(prediction, self.usual_prediction)
        chosen = self.usual_prediction if prediction is None else prediction
        if chosen is None:
            raise ValueError(
                f"prediction must be given for {type(network).__name__}, a network of no known "
                'family: "epsilon", "sample", "v_prediction", "flow", "score" or "both"'
            )
        self.network = network
        self.prediction = prediction_of(chosen)
        self.schedule: NoiseSchedule | None = (
            self.own_schedule(network) if schedule is None else schedule
        )

    def own_schedule(self, network: Any) -> NoiseSchedule | None:
        """The schedule that the network itself tells, if any."""
        return None

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        """The network's raw output, [B, C, H, W] (2 C channels where variances are learned)."""
        return unpacked(self.network(x, t, **conditioning))

    def __repr__(self) -> str:
        name = type(uncompiled(self.network)).__name__
        return f"{type(self).__name__}({name}, predicts {self.prediction.name})"


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
    family = first_answer(lambda framework: framework.denoiser(network)) or NetworkDenoiser
    return family(network, prediction, schedule)


def unpacked(output: Any) -> Tensor:
    """The tensor in what a network returned: itself, its first entry, or its `sample`.

    Raises TypeError where there is none.
    """
    found = output
    if isinstance(found, Mapping) and "sample" in found:
        found = found["sample"]
    elif isinstance(found, list | tuple) and found:
        found = found[0]
    elif not isinstance(found, Tensor):
        found = getattr(found, "sample", found)
    if not isinstance(found, Tensor):
        raise TypeError(
            "network must return a tensor, a tuple that begins with one, or something with a "
            f"sample in it; got {type(output).__name__}"
        )
    return found


def uncompiled(network: Any) -> Any:
    """The module inside what torch.compile made."""
    return getattr(network, "_orig_mod", network)


def named(network: Any, package: str, *names: str) -> bool:
    """Whether a network's class, or one it derives from, is that package's of one of the names."""
    classes = type(uncompiled(network)).__mro__
    return any(c.__module__.split(".")[0] == package and c.__name__ in names for c in classes)


def _agreed(given: str | Prediction | None, known: str) -> str | Prediction:
    """The prediction that is known, unless another one was given."""
    if given is not None and prediction_of(given).name != known:
        raise ValueError(
            f"prediction must be {known!r}, as the network or its scheduler says; "
            f"got {prediction_of(given).name!r}"
        )
    return known if given is None else given
