"""What other packages bring, behind one protocol: networks, schedules, pipelines, facts of capture.

`wrap`, `NoiseSchedule.from_diffusers`, `accelerate` and the capture of loops ask here. Who answers
is a package of `fastdiff/integrations/`, which registers itself when it is imported; none of them
imports its framework before it is given something of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Framework:
    """A framework's answers; what is not its own it answers with None, or with nothing."""

    def denoiser(self, network: Any) -> Callable[..., Any] | None:
        """What wraps this network, called as (network, prediction or None, schedule or None)."""
        return None

    def schedule(self, scheduler: Any) -> Any | None:
        """The `NoiseSchedule` of one of its schedulers, or of a scheduler's configuration."""
        return None

    def prediction(self, scheduler: Any) -> str | None:
        """What the network beside one of its schedulers predicts, in the names of this package."""
        return None

    def tableau_options(self, scheduler: Any, given: dict[str, Any]) -> dict[str, Any] | None:
        """What else of a scheduler a tableau takes, such as clipping, beside the options given."""
        return None

    def load(self, folder: str | Path) -> tuple[Any, Any] | None:
        """A wrapped network and its scheduler, from a local folder."""
        return None

    def has_pipeline(self, what: Any) -> bool:
        """Whether this is one of its pipelines."""
        return False

    def accelerate(self, pipeline: Any, solver: str | None, **options: Any) -> Any:
        """Give one of its pipelines fused steps, in place."""
        raise NotImplementedError

    def restore(self, pipeline: Any) -> Any:
        """Undo `accelerate`."""
        raise NotImplementedError

    def watched(self, module: Any, adapters: bool) -> Sequence[str]:
        """Attributes of a network's module that its forward depends on beside weights and mode.

        adapters: whether the caller answers for adapter layers, whose state is not looked at.
        Raises `fastdiff.capture.NotCapturable` for a module that no replay can hold.
        """
        return ()


_frameworks: list[Framework] = []


def register(framework: Framework) -> None:
    """Ask this framework too, after those that came before."""
    _frameworks.append(framework)


def frameworks() -> Sequence[Framework]:
    """All that are registered."""
    return _frameworks


def first_answer(question: Callable[[Framework], Answer | None]) -> Answer | None:
    """The first answer that is not None."""
    return next((a for f in _frameworks if (a := question(f)) is not None), None)
