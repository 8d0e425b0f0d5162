"""Runs a tableau over a denoiser: one network call and one fused launch per stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff import _ext
from fastdiff.capture import (
    MEASURED_STAGES,
    Loop,
    NotCapturable,
    Stages,
    cache_of,
    captures,
    leaf_key,
    network_state,
)
from fastdiff.denoisers import NetworkDenoiser
from fastdiff.execution.run import Given, Run, StageTable, Table
from fastdiff.ops import SpectralGains, seeded_noise
from fastdiff.preconditioning import Preconditioner
from fastdiff.prediction import Prediction
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build_tableau
from fastdiff.tableau import Tableau

Denoiser = Callable[..., Tensor]
AfterStage = Callable[[int, Tensor], None]

WHOLE_LOOP_CALLS = 16  # beyond, a graph of the whole loop costs more to record than it saves


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each stage.

    Attributes:
        call: how many network calls are done, 1 .. calls.
        calls: how many there will be.
        time: the time the network was told at this call.
        state: [B, ...] what the network sees next (after the last call: the result); a view of the
            sampler's buffer, to look at: copy what is to be kept. Changes may not reach the
            network.
    """

    call: int
    calls: int
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
            are modules, where a measurement at that call finds it faster. "always": also for other
            callables, and on the CPU, where it is slower and serves as a proof. Up to 16 network
            calls are one replay; longer loops, and any with a callback or a progress bar, replay
            one recorded stage, which serves every number of steps. With FASTDIFF_CAPTURE=0 in the
            environment the loop is stepwise. Weights may be changed in place; new ones are noticed.
        capture_key: called before each replay; a recorded loop is used where this returns what it
            did then, such as the name of the active adapter.
        preconditioner: what the moves of "predictor_corrector", "reverse_diffusion", or any solver
            that keeps one state, and the initial noise pass through (`fastdiff.Preconditioner`).
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
        self.denoiser, self.tableau, self.dtype, self.progress = denoiser, tableau, dtype, progress
        self.dynamic_threshold = dynamic_threshold
        captures(capture, torch.device("cpu"))  # names a mode that is none
        self.capture, self.capture_key = capture, capture_key
        if preconditioner is None:
            preconditioner = Preconditioner()
        if not isinstance(preconditioner, Preconditioner):
            raise TypeError("preconditioner must be a fastdiff.Preconditioner; got "
                            f"{type(preconditioner).__name__}")  # fmt: skip
        if not preconditioner.is_identity:
            tableau.carried()  # names a solver that it cannot act on
        self.preconditioner = preconditioner
        self._preconditioners: dict[torch.device, Preconditioner] = {}
        self._tables: dict[torch.device, Table] = {}
        self._stage_tables: dict[torch.device, StageTable] = {}
        self._routed: dict[str, int] = {}

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
        given = Given(noise, seeds, image, mask, stage_noise, guidance_scale, guidance_rescale,
                       uncond, conditioning)  # fmt: skip
        result, after = None, self._after_stage(callback)
        if self._captures(noise.device):
            given = self._ready(given)
            result = self._captured(given, after)
        if result is None:
            result = self._stepwise(given, self._table(noise.device), after).clone()
        return result

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
        device = torch.device(device) if device is not None else self._network_device()
        noise = torch.zeros(tuple(shape), dtype=self.dtype, device=device)
        device = noise.device  # with its number
        seeds = torch.zeros(noise.shape[0], dtype=torch.int64, device=device)
        image = noise if self.tableau.from_image else None
        if conditioning or guidance_scale is not None or self._captures(device):
            silent = (lambda progress: None) if callback else None
            self(noise, seeds=seeds, image=image, guidance_scale=guidance_scale, uncond=uncond,
                 callback=silent, **conditioning)  # fmt: skip
            return self
        given = Given(noise, seeds, image, None, None, None, 0.0, None, {})
        run = self._run(given, self._table(device))
        for number, stage in enumerate(self.tableau.stages):
            if stage.fill is None:
                run.launch(number, None if stage.time is None else noise)
        return self

    def describe(self, shape: Sequence[int] | None = None) -> dict[str, Any]:
        """What runs, and what it costs: a dictionary of plain values.

        `shape` [B, ...] adds the bytes the solver moves. "routed" counts, since the sampler was
        made, what did not go through the fused launch and why.
        """
        tableau = self.tableau
        device = self._network_device()
        host = "C++" if _ext.HAS_EXT else "PyTorch"
        description = {
            "solver": tableau.solver,
            "schedule": tableau.schedule,
            "prediction": tableau.prediction,
            "steps": tableau.steps,
            "calls": tableau.nfe,
            "launches": tableau.launches,
            "slots": tableau.slots,
            "passes": tableau.passes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(device),
            "backend": "Triton" if device.type == "cuda" else host,
            "preconditioner": repr(self.preconditioner),
            "loop": "captured" if self._captures(device) else "eager",
            "routed": dict(self._routed),
        }
        if self._captures(device):
            cache = cache_of(self.denoiser)
            with cache.lock:
                description["captured"] = sum(isinstance(v, Loop) for v in cache.loops.values())
                description["captured_bytes"] = cache.bytes
        gains = self._gains(device)
        if gains is not None:
            description["moves"] = gains.describe(torch.empty(0, dtype=self.dtype, device=device))
        if shape is not None:
            description["bytes"] = tableau.passes * int(np.prod(shape)) * self.dtype.itemsize
        return description

    def __repr__(self) -> str:
        d = self.describe()
        return (
            f"Sampler({d['solver']}, {d['steps']} steps, {d['calls']} calls, {d['launches']} "
            f"launches by {d['backend']} on {d['device']})"
        )

    # -- inside -----------------------------------------------------------------------------------

    def _stepwise(
        self,
        given: Given,
        table: Table,
        after: AfterStage | None = None,
        most: int = 0,
    ) -> Tensor:
        """The loop in Python; returns the slot that holds the result.

        most: stages after the first, to measure the time of these; 0: all.
        """
        run = self._run(given, table)
        stages = self.tableau.stages
        for number, stage in enumerate(stages[: most + 1] if most else stages):
            output = None if stage.time is None else run.evaluate(number)
            run.launch(number, output)
            if number and after is not None:
                after(number - 1, run.slots)
        return run.views[self.tableau.result]

    def _after_stage(self, callback: Callable[[Progress], None] | None) -> AfterStage | None:
        """What is done after stage 1 + number, given all slots; None: nothing."""
        if callback is None and not self.progress:
            return None
        bar, stages, calls = self._bar(), self.tableau.stages, self.tableau.nfe

        def after(number: int, slots: Tensor) -> None:
            stage = stages[number + 1]
            if stage.time is None:
                return
            call = sum(s.time is not None for s in stages[: number + 2])
            if bar is not None:
                bar.update(call - bar.n)
                if call == calls:
                    bar.close()
            if callback is not None:
                state = slots[stage.writes[0].slot]
                callback(Progress(call, calls, float(np.mean(stage.time)), state))

        return after

    def _run(self, given: Given, table: Table) -> Run:
        return Run(self.denoiser, given, table, self._network_dtype(given.noise),
                   self.dynamic_threshold, self._count)  # fmt: skip

    def _captures(self, device: torch.device) -> bool:
        """Whether a call on this device may be a replay."""
        known = self.capture == "always" or self._parameter is not None  # else: whose weights?
        return known and captures(self.capture, device)

    def _captured(self, given: Given, after: AfterStage | None) -> Tensor | None:
        """The loop as a replay, recorded at the first call of its kind; None: not this time.

        Recorded whole, or by the stage: for callbacks, and for loops of many calls.
        """
        device, cache, memory = given.noise.device, cache_of(self.denoiser), list[Tensor]()
        leaves, spec = tree_flatten(given)
        try:
            staged = after is not None or self.tableau.nfe > WHOLE_LOOP_CALLS
            stages = self._stages(given, after) if staged else None
        except NotCapturable as reason:
            if after is not None:
                self._count(f"stepwise for the callback or progress bar: {reason}")
                return None
            stages, staged = None, False
        table = self._table(device) if stages is None else self._stage_table(device)

        def kind() -> Hashable:
            return (table.structure, self.dtype, self.dynamic_threshold, spec,
                    tuple(leaf_key(leaf) for leaf in leaves))  # fmt: skip

        def state() -> Hashable:
            extra = self.capture_key() if self.capture_key is not None else None
            weights, found = network_state(self.denoiser, device, adapters=extra is not None)
            memory.extend(weights)
            return found, extra

        def record() -> Loop:
            if isinstance(table, StageTable):
                return self._recorded_stage(leaves, spec, device, memory, cache.place(device))
            return self._recorded(leaves, spec, device, memory, cache.place(device))

        result, why = cache.call(
            kind,
            state,
            record,
            lambda: self._stepwise(given, self._table(device), most=staged and MEASURED_STAGES),
            leaves,
            table.numbers[:1] if isinstance(table, StageTable) else table.buffers,
            stages,
            measure=self.capture == "auto",
            device=device,
        )
        if result is None:
            self._count(f"stepwise, {why}")
        return result

    def _stages(self, given: Given, after: AfterStage | None) -> Stages:
        """What a recorded stage is fed.

        Raises NotCapturable where the stages differ in more than numbers.
        """
        apart = {"a mask": given.mask, "stage_noise": given.stage_noise,
                 "dynamic_threshold": self.dynamic_threshold}  # fmt: skip
        for name, value in apart.items():
            if value is not None:
                raise NotCapturable(f"{name} works on each stage in its own way")
        table = self._stage_table(given.noise.device)
        numbers = [[row] for row in table.numbers[1:]]
        return Stages(numbers, self.tableau.result, after)

    def _ready(self, given: Given) -> Given:
        """The arguments of a run with all that the host has to do for them done."""
        scale, seeds, noises = given.guidance_scale, given.seeds, given.stage_noise
        if scale is not None:
            scale = torch.as_tensor(scale, dtype=self.dtype, device=given.noise.device)
        if noises is not None:
            wanted = sum(stage.is_stochastic for stage in self.tableau.stages)
            noises = [noise.to(given.noise.device) for noise in islice(noises, wanted)]
        mask = None if given.mask is None else given.mask.to(given.noise.device)
        uncond = given.uncond and _onto(given.uncond, given.conditioning)
        if not self.tableau.stochastic:
            seeds = noises = None
        elif seeds is None and noises is None:
            seeds = torch.randint(2**62, (len(given.noise),)).to(given.noise.device)
        return given._replace(
            guidance_scale=scale, seeds=seeds, stage_noise=noises, mask=mask, uncond=uncond
        )

    def _recorded(
        self, leaves: list[Any], spec: Any, device: torch.device, memory: list[Tensor], place: Any
    ) -> Loop:
        """The loop, recorded over buffers and a table of its own."""
        with torch.inference_mode(False):
            table = Table(self.tableau, self.dtype, device, self._gains(device))
        body = lambda static: self._stepwise(tree_unflatten(static, spec), table)
        return Loop(body, leaves, table.buffers, memory, device, place)

    def _recorded_stage(
        self, leaves: list[Any], spec: Any, device: torch.device, memory: list[Tensor], place: Any
    ) -> Loop:
        """The loop's start and its first stages, recorded over buffers and a table of their own."""
        with torch.inference_mode(False):
            table = StageTable(self.tableau, self.dtype, device, self._gains(device))
        run: Run

        def start(static: list[Any]) -> Tensor:
            nonlocal run
            run = self._run(tree_unflatten(static, spec), table)
            run.launch(0, None)
            return run.slots

        def stage(number: int) -> Tensor:
            run.read_times()
            run.launch(number, run.evaluate(number))
            return run.slots

        turns = [(partial(stage, i), table.numbers[i : i + 1]) for i in range(1, table.period + 1)]
        loop = Loop(start, leaves, table.numbers[:1], memory, device, place, stages=turns)
        loop.held += [*run.tensors(), table]
        return loop

    def _bar(self) -> Any:
        if not self.progress:
            return None
        from tqdm import tqdm

        return tqdm(total=self.tableau.nfe, desc=self.tableau.solver, unit="call")

    def _network_device(self) -> torch.device:
        parameter = self._parameter
        return parameter.device if parameter is not None else torch.get_default_device()

    @property
    def _parameter(self) -> Tensor | None:
        if not isinstance(self.denoiser, nn.Module):
            return None
        return next((p for p in self.denoiser.parameters() if p.is_floating_point()), None)

    def _network_dtype(self, noise: Tensor) -> torch.dtype:
        parameter = self._parameter
        if parameter is not None:
            return parameter.dtype
        return noise.dtype if noise.dtype in (torch.float16, torch.bfloat16) else self.dtype

    def _initial_noise(
        self,
        noise: Tensor | None,
        seeds: int | Sequence[int] | Tensor | None,
        shape: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        if seeds is not None:
            device = noise.device if isinstance(noise, Tensor) else self._network_device()
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

    def _table(self, device: torch.device) -> Table:
        if device not in self._tables:
            gains = self._gains(device)
            self._tables[device] = Table(self.tableau, self.dtype, device, gains)
        return self._tables[device]

    def _stage_table(self, device: torch.device) -> StageTable:
        if device not in self._stage_tables:
            gains = self._gains(device)
            self._stage_tables[device] = StageTable(self.tableau, self.dtype, device, gains)
        return self._stage_tables[device]

    def _gains(self, device: torch.device) -> SpectralGains | None:
        """The preconditioner's, on a device; one object for each."""
        if device not in self._preconditioners:
            self._preconditioners[device] = self.preconditioner.to(device)
        return self._preconditioners[device].gains

    def _count(self, reason: str) -> None:
        self._routed[reason] = self._routed.get(reason, 0) + 1


def _onto(other: Any, value: Any) -> Any:
    """What stands in for tensors, as tensors like them."""
    if isinstance(value, Tensor):
        return torch.as_tensor(other, dtype=value.dtype, device=value.device)
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: _onto(v, value.get(k)) for k, v in other.items()}
    return other


def _agreed(said: str | Prediction | None, wrapped: NetworkDenoiser) -> Prediction:
    """The wrapped network's prediction, which must not be said otherwise."""
    known = wrapped.prediction
    name = said.name if isinstance(said, Prediction) else said
    if name not in (None, known.name):
        raise ValueError(f"prediction must be {known.name!r}, the wrapped network's; got {name!r}")
    return known
