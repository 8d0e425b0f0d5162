"""Runs a tableau over a denoiser: one network call and one fused launch per stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _ext
from fastdiff.capture import Loop, cache_of
from fastdiff.denoisers import NetworkDenoiser
from fastdiff.execution.program import AfterStage, Denoiser, Program
from fastdiff.execution.replay import Replay, ready
from fastdiff.execution.run import Inputs
from fastdiff.ops import seeded_noise
from fastdiff.preconditioning import Preconditioner
from fastdiff.prediction import Prediction
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build_tableau
from fastdiff.tableau import Tableau


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each stage.

    Attributes:
        call: how many network calls are done, 1 .. nfe.
        nfe: how many there will be.
        time: the time the network was told at this call.
        state: [B, ...] what the network sees next (after the last call: the result); a view of the
            sampler's buffer, to look at: copy what is to be kept. Changes may not reach the
            network.
    """

    call: int
    nfe: int
    time: float
    state: Tensor


class Sampler:
    """Samples a diffusion model in few steps.

    Args:
        denoiser: any callable `(x [B, C, H, W], t [B], **conditioning) -> tensor`: a network, a
            function around one, or what `fastdiff.wrap` makes of one. Samples of any rank (images,
            latents, audio, video). An output with 2 C channels is cut to its first C (learned
            variance), except for prediction "both".
        schedule: the noise schedule the network was trained with; left out where a wrapped network
            brings it.
        solver: one of `fastdiff.solver_names()`.
        steps: intervals of the time grid.
        prediction: what the network predicts: "epsilon", "sample", "v_prediction", "flow",
            "score", "both" or a `fastdiff.Prediction`. Default: what a wrapped network says, else
            "epsilon".
        tableau: a ready tableau in place of schedule, solver, steps and options.
        dtype: of the state and all solver arithmetic; float32 unless torch.float64 is asked for.
            The network is fed its own dtype (that of its parameters; a plain function is fed the
            noise's if that is half precision).
        progress: show a progress bar.
        dynamic_threshold: a quantile such as 0.995: each image's x0 estimates are clamped to its
            own quantile of |x0| where that is above the upper clip bound, and scaled back to it
            (Saharia et al. 2022). Needs `clip`. Not linear: done by PyTorch before the launch.
        capture: whether a call may be a replay, recorded at the first call of its kind (shapes,
            layouts, dtypes, keywords, number of steps). "auto": as a CUDA graph, for networks that
            are modules. "always": also for other callables, and on the CPU, where it is slower and
            serves as a proof. Up to 16 network calls are one replay; longer loops, and any with a
            callback or a progress bar, replay one recorded stage, which serves every number of
            steps. With FASTDIFF_CAPTURE=0 in the environment the loop is stepwise. Weights may be
            changed in place; new ones are noticed.
        capture_key: called before each replay; a recorded loop is used where this returns what it
            did then, such as the name of the active adapter.
        preconditioner: what the initial noise and the increments of "predictor_corrector",
            "reverse_diffusion", or any solver that keeps one state pass through
            (`fastdiff.Preconditioner`).
        options: to `fastdiff.build_tableau`: spacing, start, convention, clip, from_image, eta, ...

    Noise is of unit variance; the tableau scales it. Sampling ends at the clean image where the
    schedule has one, so the result is x0.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule | None = None,
        *,
        solver: str = "ipndm",
        steps: int | None = None,
        prediction: str | Prediction | None = None,
        tableau: Tableau | None = None,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
        dynamic_threshold: float | None = None,
        capture: str = "auto",
        capture_key: Callable[[], Hashable] | None = None,
        preconditioner: Preconditioner | None = None,
        **options: Any,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable; got {type(denoiser).__name__}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
        wrapped = denoiser if isinstance(denoiser, NetworkDenoiser) else None
        if wrapped is not None:
            said = tableau.prediction if tableau is not None else prediction
            prediction = _agreed(said, wrapped)
        if tableau is None:
            if wrapped is not None and wrapped.schedule is not None:
                if schedule not in (None, wrapped.schedule):
                    raise ValueError(
                        "schedule must be left out: the wrapped network has "
                        f"{wrapped.schedule.name}; wrap it with another one to change that"
                    )
                schedule = wrapped.schedule
            if schedule is None:
                raise ValueError("schedule must be given unless tableau is")
            kind = "epsilon" if prediction is None else prediction
            tableau = build_tableau(solver, schedule, steps, prediction=kind, **options)
        elif schedule is not None or steps is not None or options:
            raise ValueError(
                "tableau stands for schedule, steps and options; give one or the other"
            )
        if dynamic_threshold is not None:
            if not 0 < dynamic_threshold <= 1:
                raise ValueError(f"dynamic_threshold must be in (0, 1]; got {dynamic_threshold}")
            if tableau.clip is None or tableau.clip[0] != -tableau.clip[1]:
                raise ValueError(
                    "dynamic_threshold must come with a symmetric clip, the bound it scales to; "
                    f"got clip {tableau.clip}"
                )
        if preconditioner is None:
            preconditioner = Preconditioner()
        if not isinstance(preconditioner, Preconditioner):
            raise TypeError(
                "preconditioner must be a fastdiff.Preconditioner; got "
                f"{type(preconditioner).__name__}"
            )
        if not preconditioner.is_identity:
            tableau.require_increments()
        self.progress = progress
        self._replay = Replay(capture, capture_key)
        self._program = Program(denoiser, tableau, dtype, dynamic_threshold, preconditioner)

    @property
    def denoiser(self) -> Denoiser:
        """What is sampled."""
        return self._program.denoiser

    @property
    def tableau(self) -> Tableau:
        """The whole run, as a table."""
        return self._program.tableau

    @property
    def dtype(self) -> torch.dtype:
        """Of the state and all solver arithmetic."""
        return self._program.dtype

    @property
    def preconditioner(self) -> Preconditioner:
        """What increments pass through; the identity where none was given."""
        return self._program.preconditioner

    @torch.no_grad()
    def __call__(
        self,
        noise: Tensor | None = None,
        *,
        seeds: int | Sequence[int] | Tensor | None = None,
        shape: Sequence[int] | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        stage_noise: Iterable[Tensor] | None = None,
        guidance_scale: float | Tensor | None = None,
        guidance_rescale: float = 0.0,
        uncond: dict[str, Any] | None = None,
        callback: Callable[[Progress], None] | None = None,
        **conditioning: Any,
    ) -> Tensor:
        """Sample a batch.

        Args:
            noise: [B, C, H, W] unit-variance noise, or [B, ...] of any rank; contiguous or
                channels_last. None: drawn from `seeds`, each image's from its own seed alone.
            seeds: one whole number per image (or a single one for a batch of one). They also drive
                the noise of stochastic solvers; without them that takes seeds from torch's
                generator.
            shape: (C, H, W), the shape of one image, where `noise` is None.
            image: [B, ...] the image to start from, for a tableau built with `from_image=True`;
                with `mask`, the image to keep parts of.
            mask: broadcastable to [B, ...], 1 where the image is made anew, 0 where it is kept:
                after every stage the kept part is the image with the initial noise at that level.
            stage_noise: the noise of each stochastic stage in order, [B, ...] each, in place of
                seeds.
            guidance_scale: classifier-free guidance, a number or a tensor [B]: the network is
                called once on the doubled batch, uncond + scale * (cond - uncond).
            guidance_rescale: 0 .. 1, how much of the guided output is scaled back to the standard
                deviation of the conditional one (Lin et al. 2023, eq. 16). Not linear: by PyTorch.
            uncond: with guidance, what replaces entries of `conditioning` in the unconditional
                half, such as `{"labels": null_labels}`.
            callback: called with a `Progress` after every network call.
            conditioning: passed to the denoiser. With guidance, tensors whose first dimension is B
                (also those in dicts, lists and tuples) are stacked with their unconditional
                counterpart; anything else is passed as it is.

        Returns:
            [B, ...] the samples, in the solver's dtype (float32 or float64) and noise's layout.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        noise, seeds = self._initial_noise(noise, seeds, shape)
        inputs = Inputs(
            noise,
            seeds,
            image,
            mask,
            stage_noise,
            guidance_scale,
            guidance_rescale,
            uncond,
            conditioning,
        )
        program, after, result = self._program, self._after_stage(callback), None
        if self._replay.serves(program, noise.device):
            inputs = ready(program, inputs)
            result = self._replay.run(program, inputs, after)
        return program.stepwise(inputs, None, after).clone() if result is None else result

    @torch.no_grad()
    def prepare(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond: dict[str, Any] | None = None,
        callback: bool = False,
        **conditioning: Any,
    ) -> Sampler:
        """Upload the tables and compile the kernels for a batch shape [B, ...], ahead of use.

        Where the loop is captured, or guidance or conditioning is given, a whole run is made with
        it, so that the first call of such a shape replays. callback: for calls with a callback,
        which are recorded in another way. Returns the sampler itself.
        """
        program = self._program
        device = torch.device(device) if device is not None else program.network_device
        noise = torch.zeros(tuple(shape), dtype=self.dtype, device=device)
        device = noise.device  # with its number
        seeds = torch.zeros(noise.shape[0], dtype=torch.int64, device=device)
        image = noise if self.tableau.from_image else None
        if conditioning or guidance_scale is not None or self._replay.serves(program, device):
            silent = (lambda progress: None) if callback else None
            self(
                noise,
                seeds=seeds,
                image=image,
                guidance_scale=guidance_scale,
                uncond=uncond,
                callback=silent,
                **conditioning,
            )
            return self
        run = program.run(Inputs(noise, seeds, image))
        for number, stage in enumerate(self.tableau.stages):
            run.launch(number, None if stage.time is None else noise)
        return self

    def describe(self, shape: Sequence[int] | None = None) -> dict[str, Any]:
        """What runs, and what it costs: a dictionary of plain values.

        `shape` [B, ...] adds the bytes the solver moves. "routed" counts, since the sampler was
        made, what did not go through the fused launch and why.
        """
        tableau, program = self.tableau, self._program
        device = program.network_device
        captured = self._replay.serves(program, device)
        host = "C++" if _ext.HAS_EXT else "PyTorch"
        description = {
            "solver": tableau.solver,
            "schedule": tableau.schedule,
            "prediction": tableau.prediction,
            "steps": tableau.steps,
            "nfe": tableau.nfe,
            "launches": tableau.launches,
            "slots": tableau.slots,
            "passes": tableau.passes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(device),
            "backend": "Triton" if device.type == "cuda" else host,
            "preconditioner": repr(self.preconditioner),
            "loop": "captured" if captured else "eager",
            "routed": dict(program.routed),
        }
        if captured:
            cache = cache_of(self.denoiser)
            with cache.lock:
                description["captured"] = sum(isinstance(v, Loop) for v in cache.loops.values())
                description["captured_bytes"] = cache.bytes
        gains = program.gains(device)
        if gains is not None:
            description["moves"] = gains.describe(torch.empty(0, dtype=self.dtype, device=device))
        if shape is not None:
            description["bytes"] = tableau.passes * int(np.prod(shape)) * self.dtype.itemsize
        return description

    def __repr__(self) -> str:
        d = self.describe()
        return (
            f"Sampler({d['solver']}, {d['steps']} steps, {d['nfe']} calls, {d['launches']} "
            f"launches by {d['backend']} on {d['device']})"
        )

    # -- inside -----------------------------------------------------------------------------------

    def _after_stage(self, callback: Callable[[Progress], None] | None) -> AfterStage | None:
        """What is done after each stage; None: nothing."""
        if callback is None and not self.progress:
            return None
        bar, stages, calls = self._bar(), self.tableau.stages, self.tableau.nfe

        def after(number: int, slots: list[Tensor]) -> None:
            stage = stages[number]
            if stage.time is None:
                return
            call = sum(s.time is not None for s in stages[: number + 1])
            if bar is not None:
                bar.update(call - bar.n)
                if call == calls:
                    bar.close()
            if callback is not None:
                state = slots[stage.writes[0].slot]
                callback(Progress(call, calls, float(np.mean(stage.time)), state))

        return after

    def _bar(self) -> Any:
        if not self.progress:
            return None
        from tqdm import tqdm

        return tqdm(total=self.tableau.nfe, desc=self.tableau.solver, unit="call")

    def _initial_noise(
        self,
        noise: Tensor | None,
        seeds: int | Sequence[int] | Tensor | None,
        shape: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        if seeds is not None:
            device = noise.device if isinstance(noise, Tensor) else self._program.network_device
            given = [seeds] if isinstance(seeds, int) else seeds
            try:
                seeds = torch.as_tensor(given, device=device)
            except (RuntimeError, TypeError, ValueError):  # no numbers, or of more than 64 bits
                seeds = torch.empty(())
            if seeds.ndim != 1 or (seeds.numel() and seeds.is_floating_point()):
                raise ValueError(
                    f"seeds must be whole numbers of 64 bits, one per image; got {given}"
                )
            seeds = seeds.to(torch.int64).contiguous()
        if noise is None:
            if seeds is None or shape is None:
                raise ValueError("noise must be given, or seeds and shape to draw it from")
            noise = seeded_noise(seeds, (len(seeds), *shape), dtype=self.dtype)
        elif not isinstance(noise, Tensor) or not noise.is_floating_point():
            kind = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
            raise TypeError(f"noise must be a floating-point tensor [B, ...]; got {kind}")
        elif shape is not None and tuple(shape) != tuple(noise.shape[1:]):
            raise ValueError(f"shape must be {tuple(noise.shape[1:])}, noise's; got {tuple(shape)}")
        if noise.ndim < 1:
            raise ValueError("noise must have a batch dimension [B, ...]; got a scalar")
        if seeds is not None and len(seeds) != len(noise):
            raise ValueError(f"seeds must be {len(noise)}, one per image; got {len(seeds)}")
        return noise, seeds


def _agreed(said: str | Prediction | None, wrapped: NetworkDenoiser) -> Prediction:
    """The wrapped network's prediction, which must not be said otherwise."""
    known = wrapped.prediction
    name = said.name if isinstance(said, Prediction) else said
    if name not in (None, known.name):
        raise ValueError(f"prediction must be {known.name!r}, the wrapped network's; got {name!r}")
    return known
