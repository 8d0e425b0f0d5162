"""EDM's preconditioned networks (Karras et al. 2022), and later ones of the same interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdiff.denoisers import NetworkDenoiser, uncompiled, unpacked
from fastdiff.frameworks import Framework, register
from fastdiff.schedule import NoiseSchedule

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # Karras et al. 2022, table 1


class EDMNetwork(NetworkDenoiser):
    """`net(x, sigma, class_labels)`: returns the denoised image D(x; sigma), so predicts x0.

    The schedule is EDM's, cut to what the network was trained on (`sigma_min`, `sigma_max`).
    Sigmas are handed over as they are: a network of discrete levels rounds them itself.
    Conditioning: `class_labels` [B, label_dim], one-hot.
    """

    usual_prediction, only_prediction = "sample", True

    @staticmethod
    def recognises(network: Any) -> bool:
        network = uncompiled(network)
        return all(hasattr(network, name) for name in ("img_resolution", "label_dim")) and any(
            hasattr(network, name) for name in ("round_sigma", "sigma_data")
        )

    def own_schedule(self, network: Any) -> NoiseSchedule:
        network = uncompiled(network)
        low, high = (
            float(getattr(network, name, bound))
            for name, bound in (("sigma_min", SIGMA_MIN), ("sigma_max", SIGMA_MAX))
        )
        return NoiseSchedule.edm(max(low, SIGMA_MIN), min(high, SIGMA_MAX))

    def forward(self, x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        labels = conditioning.get("class_labels")
        if labels is not None:
            classes = int(uncompiled(self.network).label_dim)
            if labels.shape != (len(x), classes) or not classes:
                allowed = f"one-hot, [{len(x)}, {classes}]" if classes else "left out: no classes"
                raise ValueError(f"class_labels must be {allowed}; got shape {tuple(labels.shape)}")
        return unpacked(self.network(x, t, **conditioning))


class EDM(Framework):
    """What EDM brings to `wrap`."""

    def denoiser(self, network: Any) -> Callable[..., Any] | None:
        return EDMNetwork if EDMNetwork.recognises(network) else None


register(EDM())
