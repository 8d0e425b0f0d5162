"""fastdiff: few-step sampling of diffusion models with fused solver steps."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source checkout the Triton kernels lie beside this package, in kernels/ (no __init__.py
# there: Hugging Face's `kernels` must win that name). Only our own checkout has
# csrc/multistep_step.h next to it.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "csrc" / "multistep_step.h").is_file():
    __path__.append(str(_checkout))
del _checkout

from fastdiff import integrations, ops  # noqa: E402
from fastdiff.acceleration import accelerate, restore  # noqa: E402
from fastdiff.capture import check_capturable  # noqa: E402
from fastdiff.denoisers import NetworkDenoiser, wrap  # noqa: E402
from fastdiff.ops import seeded_noise  # noqa: E402
from fastdiff.preconditioning import (  # noqa: E402
    MaskStatistics,
    Preconditioner,
    estimate_masks,
    power_law_masks,
)
from fastdiff.prediction import PREDICTIONS, Prediction  # noqa: E402
from fastdiff.sampler import Progress, Sampler  # noqa: E402
from fastdiff.schedule import NoiseSchedule  # noqa: E402
from fastdiff.solvers import build_tableau, register_solver, solver_names  # noqa: E402
from fastdiff.tableau import Form, Stage, Tableau, Trace, Write  # noqa: E402

__all__ = [
    "PREDICTIONS",
    "Form",
    "MaskStatistics",
    "NetworkDenoiser",
    "NoiseSchedule",
    "Preconditioner",
    "Prediction",
    "Progress",
    "Sampler",
    "Stage",
    "Tableau",
    "Trace",
    "Write",
    "accelerate",
    "build_tableau",
    "check_capturable",
    "estimate_masks",
    "integrations",
    "ops",
    "power_law_masks",
    "register_solver",
    "restore",
    "seeded_noise",
    "solver_names",
    "wrap",
]
