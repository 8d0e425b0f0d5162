"""The fused schedulers beside the stock classes: options, whole trajectories, comparisons."""

import inspect
import random

import diffusers
import torch

from fastdiff.integrations import diffusers_schedulers as fused

BETAS = {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"]}
SPACING = {"timestep_spacing": ["leading", "trailing", "linspace"]}
KARRAS = {"use_karras_sigmas": [False, True]}
PREDICTION = {"prediction_type": ["epsilon", "v_prediction", "sample"]}
OPTIONS = {
    "PNDMScheduler": BETAS
    | {"timestep_spacing": ["leading", "trailing"]}
    | {"prediction_type": ["epsilon", "v_prediction"]}
    | {"skip_prk_steps": [False, True], "set_alpha_to_one": [False, True], "steps_offset": [0, 1]},
    "DDIMScheduler": BETAS | SPACING | PREDICTION
    | {"clip_sample": [False, True], "set_alpha_to_one": [False, True],
       "thresholding": [False, False, True], "rescale_betas_zero_snr": [False, False, True]},
    "DDPMScheduler": BETAS | SPACING | PREDICTION
    | {"clip_sample": [False, True],
       "variance_type": ["fixed_small", "fixed_large", "fixed_small_log"]},
    "DPMSolverMultistepScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"solver_order": [1, 2, 3], "solver_type": ["midpoint", "heun"],
       "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"], "lower_order_final": [False, True],
       "euler_at_final": [False, True], "thresholding": [False, False, True]},
    "UniPCMultistepScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"solver_order": [1, 2, 3], "solver_type": ["bh1", "bh2"], "predict_x0": [True, False],
       "disable_corrector": [[], [0, 1]], "lower_order_final": [True, False]},
    "DEISMultistepScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"solver_order": [1, 2, 3], "lower_order_final": [False, True]},
    "EulerDiscreteScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"final_sigmas_type": ["zero", "sigma_min"], "timestep_type": ["discrete"]},
    "HeunDiscreteScheduler": SPACING | PREDICTION | KARRAS
    | {"beta_schedule": ["linear", "scaled_linear"], "clip_sample": [False, True]},
    "ScoreSdeVeScheduler": {"sigma_max": [50.0, 1348.0], "snr": [0.1, 0.15]},
}  # fmt: skip
NAMES = list(OPTIONS)


def configurations(name, count):
    choose = random.Random(name)
    for _ in range(count):
        config = {key: choose.choice(values) for key, values in OPTIONS[name].items()}
        if config.get("algorithm_type", "").startswith("sde") and config["solver_order"] == 3:
            config["solver_type"] = "midpoint"
        yield config


def network(x, t):
    """Smooth, not linear, and different at each time."""
    return (x * (0.4 + 3e-4 * float(t))).tanh()


def trajectory(
    scheduler, steps, dtype=torch.float32, shape=(2, 3, 6, 5), generator=None, **options
):
    """Every state of a run, float64; noise from a generator of its own."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x * scheduler.init_noise_sigma
    predict = getattr(scheduler, "step", None) or scheduler.step_pred
    if "generator" in inspect.signature(predict).parameters:
        options["generator"] = generator or torch.Generator().manual_seed(1)
    states = []
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            output = network(scheduler.scale_model_input(x, t), t)
        if hasattr(scheduler, "step_correct"):
            x = scheduler.step_correct(output, x, generator=options["generator"]).prev_sample
        x = predict(output, t, x, **options).prev_sample
        states.append(x.double())
    return torch.stack(states)


def stock(name, config):
    return getattr(diffusers, name)(**config)


def ours(name, config):
    return getattr(fused, name)(**config)


def assert_as_near(found, theirs, exact, slack):
    """Our error is at most twice theirs, and NaN and infinity are where theirs are."""
    if not theirs.isfinite().all():
        assert torch.equal(found.isfinite(), theirs.isfinite())
        return
    scale = exact.abs().flatten(1).amax(1).clamp_min(1e-6).view(-1, *(1,) * (exact.ndim - 1))
    error, allowed = (float(((x - exact) / scale).abs().amax()) for x in (found, theirs))
    assert error <= 2 * allowed + slack


def assert_close(found, wanted, tolerance):
    """Relative to each state's largest value; NaN like NaN."""
    scale = wanted.nan_to_num(0, 0, 0).abs().flatten(1).amax(1).clamp_min(1e-6)
    scale = scale.view(-1, *(1,) * (wanted.ndim - 1))
    torch.testing.assert_close(
        found / scale, wanted / scale, rtol=0, atol=tolerance, equal_nan=True
    )
