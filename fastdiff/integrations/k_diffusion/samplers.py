"""k-diffusion's sampler functions: `sample_ipndm(model, x, sigmas, ...)` and the like.

`model(x, sigma [B], **extra_args)` returns the denoised image; x is [B, ...] at the first sigma;
sigmas [N + 1] decrease, the last may be 0. The functions stand where k-diffusion's do (options:
docs/k_diffusion.md) and follow the published formulas of the name, slips included
(`sample_ipndm_v`). A step is one fused launch; sigmas are read to the host once, at entry.

A callback gets a dict after the first evaluation of each step: `x` (what the model saw), `i`,
`sigma`, `sigma_hat` (with the churned noise) and `denoised`, all live. Noise is torch's own, or
from `noise_sampler(sigma, sigma_next)`; s_noise scales it. States are kept in float32 (float64 for
a float64 x); the result has the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.execution.program import Program
from fastdiff.execution.run import Inputs
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build_tableau

Model = Callable[..., Tensor]
Options = tuple[tuple[str, Any], ...]


# == Deterministic =================================================================================


def sample_euler(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                 callback: Any = None, disable: bool | None = None, s_churn: float = 0.0,
                 s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
                 noise_sampler: Any = None) -> Tensor:  # fmt: skip
    """Euler's method; with s_churn EDM's stochastic one (Karras et al. 2022, alg. 2)."""
    options = _churn("euler", s_churn, s_tmin, s_tmax)
    return _run(model, x, sigmas, extra_args, callback, disable, *options,
                noise_sampler=noise_sampler, s_noise=s_noise)  # fmt: skip


def sample_heun(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                callback: Any = None, disable: bool | None = None, s_churn: float = 0.0,
                s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
                noise_sampler: Any = None) -> Tensor:  # fmt: skip
    """Heun's method, two calls a step; with s_churn EDM's stochastic one (algorithm 2)."""
    options = _churn("heun", s_churn, s_tmin, s_tmax)
    return _run(model, x, sigmas, extra_args, callback, disable, *options, calls=2,
                noise_sampler=noise_sampler, s_noise=s_noise)  # fmt: skip


def sample_dpm_2(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                 callback: Any = None, disable: bool | None = None) -> Tensor:  # fmt: skip
    """DPM-Solver-2 (Lu et al. 2022): the midpoint in log sigma, two calls a step."""
    return _run(model, x, sigmas, extra_args, callback, disable, "dpm_solver_2", calls=2)


def sample_lms(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Any = None, disable: bool | None = None,
               order: int = 4) -> Tensor:  # fmt: skip
    """Linear multistep in sigma with the exact weights of the grid, orders 1 to 4."""
    return _run(model, x, sigmas, extra_args, callback, disable, "ipndm_v", (("order", order),))


def sample_dpmpp_2m(model: Model, x: Tensor, sigmas: Tensor,
                    extra_args: dict[str, Any] | None = None, callback: Any = None,
                    disable: bool | None = None) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (Lu et al. 2022)."""
    return _run(model, x, sigmas, extra_args, callback, disable, "dpmpp_2m")


def sample_ipndm(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                 callback: Any = None, disable: bool | None = None) -> Tensor:  # fmt: skip
    """iPNDM (Zhang & Chen 2023), fourth order; a last step to 0 takes the denoised image."""
    return _run(model, x, sigmas, extra_args, callback, disable, "ipndm", denoise=True)


def sample_ipndm_v(model: Model, x: Tensor, sigmas: Tensor,
                   extra_args: dict[str, Any] | None = None, callback: Any = None,
                   disable: bool | None = None, max_order: int = 4) -> Tensor:  # fmt: skip
    """iPNDM for uneven grids as published, with its three slips; `sample_lms` is the exact one."""
    options = (("order", max_order),)
    return _run(model, x, sigmas, extra_args, callback, disable, "ipndm_v_published", options,
                denoise=True)  # fmt: skip


def sample_deis(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                callback: Any = None, disable: bool | None = None, max_order: int = 3,
                deis_mode: str = "tab") -> Tensor:  # fmt: skip
    """DEIS (Zhang & Chen 2023); deis_mode "tab" or "rhoab", the same in sigma as time."""
    options = (("kind", deis_mode), ("order", max_order))
    return _run(model, x, sigmas, extra_args, callback, disable, "deis", options, denoise=True)


def sample_uni_pc(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                  callback: Any = None, disable: bool | None = None, order: int = 3,
                  variant: str = "bh1") -> Tensor:  # fmt: skip
    """UniPC (Zhao et al. 2023), predictor and corrector of an order up to 3, one call a step."""
    options = (("order", order), ("variant", variant))
    return _run(model, x, sigmas, extra_args, callback, disable, "unipc", options)


def sample_uni_pc_bh2(model: Model, x: Tensor, sigmas: Tensor,
                      extra_args: dict[str, Any] | None = None, callback: Any = None,
                      disable: bool | None = None, order: int = 3) -> Tensor:  # fmt: skip
    """UniPC with B(h) = e^h - 1."""
    return sample_uni_pc(model, x, sigmas, extra_args, callback, disable, order, "bh2")


# == With noise ====================================================================================


def sample_euler_ancestral(model: Model, x: Tensor, sigmas: Tensor,
                           extra_args: dict[str, Any] | None = None, callback: Any = None,
                           disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
                           noise_sampler: Any = None) -> Tensor:  # fmt: skip
    """Euler steps that renew part of the noise, eta of it."""
    return _run(model, x, sigmas, extra_args, callback, disable, "euler_ancestral",
                (("eta", eta),), noise_sampler=noise_sampler, s_noise=s_noise)  # fmt: skip


def sample_dpmpp_2m_sde(model: Model, x: Tensor, sigmas: Tensor,
                        extra_args: dict[str, Any] | None = None, callback: Any = None,
                        disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
                        noise_sampler: Any = None) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for the SDE, midpoint form.

    Noise is independent from step to step; a Brownian tree may be given as the noise_sampler.
    """
    return _run(model, x, sigmas, extra_args, callback, disable, "dpmpp_2m_sde",
                (("eta", eta),), noise_sampler=noise_sampler, s_noise=s_noise)  # fmt: skip


def sample_lcm(model: Model, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Any = None, disable: bool | None = None,
               noise_sampler: Any = None) -> Tensor:  # fmt: skip
    """Consistency models: the denoised image, with noise of the next level."""
    return _run(model, x, sigmas, extra_args, callback, disable, "lcm",
                noise_sampler=noise_sampler)  # fmt: skip


# == The loop ======================================================================================


def _run(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None,
    callback: Callable[[dict[str, Any]], Any] | None,
    disable: bool | None,
    solver: str,
    options: Options = (),
    *,
    calls: int = 1,
    denoise: bool = False,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    s_noise: float = 1.0,
) -> Tensor:
    """Sample by a solver that takes so many calls a step; denoise: a last step to 0 is x0."""
    from tqdm.auto import trange

    levels = _levels(x, sigmas)
    steps = iter(trange(len(levels) - 1, disable=disable))
    made, dtype = 0, x.dtype

    def denoiser(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        nonlocal made
        x, sigma = x.to(dtype), sigma.to(dtype)
        denoised = model(x, sigma, **extra)
        step, inner = divmod(made, calls)
        made += 1
        if not inner:
            next(steps)
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigma[0],
                          "denoised": denoised})  # fmt: skip
        return denoised

    def noises() -> Iterator[Tensor]:
        # Churned noise comes before its step's first call, all other noise after it.
        ahead = 0 if solver.endswith("_churn") else 1
        while True:
            if noise_sampler is None:
                yield torch.randn_like(x) * s_noise
            else:
                i = (made - ahead) // calls
                yield noise_sampler(sigmas[i], sigmas[i + 1]) * s_noise

    extra = extra_args or {}
    ends_denoised = denoise and levels[-1] == 0
    run = levels[:-1] if ends_denoised else levels
    state = x
    if len(run) > 1:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        program = _program(solver, run, options, wide).over(partial(denoiser, **extra))
        # The state at the first sigma, as the unit-variance noise that the tableau will scale.
        noise = x.to(wide) / levels[0]
        with torch.no_grad():
            state = program.stepwise(Inputs(noise, stage_noise=noises())).to(dtype, copy=True)
    if ends_denoised:
        with torch.no_grad():
            state = denoiser(state, state.new_full((len(x),), levels[-2]), **extra)
    next(steps, None)  # closes the bar
    return state


def _levels(x: Tensor, sigmas: Tensor) -> tuple[float, ...]:
    """The sigmas as numbers: the only read from the device."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor [B, ...]; got {kind}")
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or len(sigmas) < 2:
        got = tuple(sigmas.shape) if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"sigmas must be a tensor [N + 1], N >= 1; got {got}")
    levels = tuple(sigmas.double().tolist())
    falling = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if not (falling and math.isfinite(levels[0]) and levels[-1] >= 0):
        raise ValueError(f"sigmas must be finite, decrease strictly and not go below 0; got "
                         f"{levels[0]:g} .. {levels[-1]:g}")  # fmt: skip
    return levels


def _churn(solver: str, churn: float, low: float, high: float) -> tuple[str, Options]:
    if churn <= 0:
        return solver, ()
    return f"{solver}_churn", (
        ("churn", churn), ("s_max", high), ("s_min", low), ("s_noise", 1.0)
    )  # fmt: skip


@lru_cache(maxsize=64)
def _program(
    solver: str, levels: tuple[float, ...], options: Options, dtype: torch.dtype
) -> Program:
    """A run without its model; the schedule reaches beyond the first sigma, for churned noise."""
    schedule = NoiseSchedule.edm(min(s for s in levels if s), 1.5 * levels[0])
    tableau = build_tableau(solver, schedule, spacing=levels, prediction="sample", **dict(options))
    return Program(_no_model, tableau, dtype)


def _no_model(x: Tensor, sigma: Tensor) -> Tensor:
    raise AssertionError("each run brings its model")
