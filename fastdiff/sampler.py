"""Runs a tableau over a denoiser: one network call and one fused launch per stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff import _ext
from fastdiff.denoisers import NetworkDenoiser
from fastdiff.graph import (
    Loop,
    cache_of,
    captures,
    leaf_key,
    network_state,
)
from fastdiff.nonlinear import keep_known, rescaled_guidance, thresholded
from fastdiff.ops import allocate_slots, multistep_step_unchecked, seeded_noise
from fastdiff.prediction import Prediction
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build_tableau
from fastdiff.tableau import Tableau

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each stage.

    Attributes:
        call: how many network calls are done, 1 .. calls.
        calls: how many there will be.
        time: the time the network was told at this call.
        state: [B, ...] what the network sees next (after the last call: the result); a view of the
            sampler's buffer, to be copied if it is to be kept.
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
        capture: whether a call may be a replay of the whole loop, recorded at the first call of its
            kind (shapes, layouts, dtypes, keywords, number of steps). "auto": as a CUDA graph, for
            networks that are modules, where a measurement at that call finds it faster. "always":
            also for other callables, and on the CPU, where it is slower and serves as a proof. With
            a callback or a progress bar, or with FASTDIFF_CAPTURE=0 in the environment, the loop is
            stepwise. Weights may be changed in place; new ones are noticed.
        capture_key: called before each replay; a recorded loop is used where this returns what it
            did then, such as the name of the active adapter.
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
        self._tables: dict[torch.device, _Table] = {}
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
        given = _Given(noise, seeds, image, mask, stage_noise, guidance_scale, guidance_rescale,
                       uncond, conditioning)  # fmt: skip
        if callback is None and not self.progress and self._captures(noise.device):
            return self._captured(given)
        return self._stepwise(given, self._table(noise.device), callback).clone()

    @torch.no_grad()
    def prepare(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        guidance_scale: float | Tensor | None = None,
        uncond: dict[str, Any] | None = None,
        **conditioning: Any,
    ) -> Sampler:
        """Upload the tables and compile the kernels for a batch shape [B, ...], ahead of use.

        Where the loop is captured, or guidance or conditioning is given, a whole run is made with
        it, so that the first call of such a shape replays. Returns the sampler itself.
        """
        device = torch.device(device) if device is not None else self._network_device()
        noise = torch.zeros(tuple(shape), dtype=self.dtype, device=device)
        device = noise.device  # with its number
        seeds = torch.zeros(noise.shape[0], dtype=torch.int64, device=device)
        image = noise if self.tableau.from_image else None
        if conditioning or guidance_scale is not None or self._captures(device):
            self(noise, seeds=seeds, image=image, guidance_scale=guidance_scale, uncond=uncond,
                 **conditioning)  # fmt: skip
            return self
        given = _Given(noise, seeds, image, None, None, None, 0.0, None, {})
        run = _Run(self, given, self._table(device))
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
            "loop": "captured" if self._captures(device) else "eager",
            "routed": dict(self._routed),
        }
        if self._captures(device):
            cache = cache_of(self.denoiser)
            with cache.lock:
                description["captured"] = sum(isinstance(v, Loop) for v in cache.loops.values())
                description["captured_bytes"] = cache.bytes
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
        given: _Given,
        table: _Table,
        callback: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """The loop in Python; returns the slot that holds the result."""
        run = _Run(self, given, table)
        bar, calls = self._bar(), 0
        for number, stage in enumerate(self.tableau.stages):
            output = None if stage.time is None else run.evaluate(number)
            run.launch(number, output)
            if stage.time is None:
                continue
            calls += 1
            if bar is not None:
                bar.update()
            if callback is not None:
                state = run.views[stage.writes[0].slot]
                callback(Progress(calls, self.tableau.nfe, float(np.mean(stage.time)), state))
        if bar is not None:
            bar.close()
        return run.views[self.tableau.result]

    def _captures(self, device: torch.device) -> bool:
        """Whether a call on this device may be a replay."""
        known = self.capture == "always" or self._parameter is not None  # else: whose weights?
        return known and captures(self.capture, device)

    def _captured(self, given: _Given) -> Tensor:
        """The loop as a replay, recorded at the first call of its kind, or why not and stepwise."""
        device, given = given.noise.device, self._ready(given)
        table, cache, memory = self._table(device), cache_of(self.denoiser), []
        leaves, spec = tree_flatten(given)

        def key() -> Hashable:
            extra = self.capture_key() if self.capture_key is not None else None
            weights, state = network_state(self.denoiser, device, adapters=extra is not None)
            memory.extend(weights)
            return (table.structure, self.dtype, self.dynamic_threshold, spec,
                    tuple(leaf_key(leaf) for leaf in leaves), state, extra)  # fmt: skip

        result, why = cache.call(
            key,
            lambda: self._recorded(leaves, spec, memory, cache.place(device)),
            lambda: self._stepwise(given, table).clone(),
            leaves,
            table.buffers,
            measure=self.capture == "auto",
            device=device,
        )
        if why:
            self._count(f"stepwise, {why}")
        return result

    def _ready(self, given: _Given) -> _Given:
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

    def _recorded(self, leaves: list[Any], spec: Any, memory: list[Tensor], place: Any) -> Loop:
        """The loop, recorded over buffers and a table of its own."""
        given = tree_unflatten(leaves, spec)
        device = given.noise.device
        with torch.inference_mode(False):
            table = _Table(self.tableau, self.dtype, device)
        body = lambda static: self._stepwise(tree_unflatten(static, spec), table)
        return Loop(body, leaves, table.buffers, memory, device, place)

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

    def _table(self, device: torch.device) -> _Table:
        if device not in self._tables:
            self._tables[device] = _Table(self.tableau, self.dtype, device)
        return self._tables[device]

    def _count(self, reason: str) -> None:
        self._routed[reason] = self._routed.get(reason, 0) + 1


class _Given(NamedTuple):
    """The arguments of one call, as `Sampler.__call__` explains them."""

    noise: Tensor
    seeds: Tensor | None
    image: Tensor | None
    mask: Tensor | None
    stage_noise: Iterable[Tensor] | None
    guidance_scale: float | Tensor | None
    guidance_rescale: float
    uncond: dict[str, Any] | None
    conditioning: dict[str, Any]


class _Table:
    """A tableau on a device: its numbers uploaded once, and what the loop asks of each stage."""

    def __init__(self, tableau: Tableau, dtype: torch.dtype, device: torch.device) -> None:
        stages, numbers = tableau.stages, range(len(tableau.stages))
        self.buffers: list[Tensor] = []  # all of its numbers; another table's may be copied in
        self.rows = self._upload([tableau.row(i) for i in numbers], dtype, device)
        self.indices = self._upload([tableau.index(i) for i in numbers], torch.int32, device)
        self.variants = [(tableau.read_width(i), len(stages[i].writes)) for i in numbers]
        self.identity = [stage.is_identity for stage in stages]
        self.stochastic = [stage.is_stochastic for stage in stages]
        self.scales_input = any(np.any(np.asarray(s.input_scale) != 1) for s in stages)
        times = [0.0 if stage.time is None else stage.time for stage in stages]
        width = tableau.samples or 1
        self.times = torch.tensor(
            np.stack([np.broadcast_to(t, width) for t in times]), device=device
        )  # float64 [stages, 1 or B]
        self.buffers.append(self.times)
        levels = [np.atleast_1d(c) for stage in stages for c in stage.level]
        uploaded = iter(self._upload(levels, dtype, device))
        self.levels = list(zip(uploaded, uploaded, strict=True))
        self.merge: list[list[Tensor]] | None = None
        if tableau.merge is not None:
            self.merge = [
                self._upload([np.atleast_1d(c) for c in pair], dtype, device)
                for pair in tableau.merge
            ]
        # What a recorded loop fixes of a run: everything but the numbers in the buffers.
        self.structure = (
            tuple(self.variants), tuple(self.identity), tuple(self.stochastic), self.scales_input,
            tuple((stage.sees, stage.writes[0].slot, stage.time is None, stage.guidance,
                   stage.fill) for stage in stages),
            tableau.slots, tableau.result, tableau.samples, tableau.from_image, tableau.clip,
            tuple(buffer.shape for buffer in self.buffers),
        )  # fmt: skip

    def _upload(
        self, arrays: list[np.ndarray], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """Views, in their shapes, of one buffer that holds all arrays."""
        flat = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays])).to(device, dtype)
        self.buffers.append(flat)
        parts = flat.split([a.size for a in arrays])
        return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]


class _Run:
    """One call of a sampler: its buffers, and the two halves of a stage."""

    def __init__(self, sampler: Sampler, given: _Given, table: _Table) -> None:
        (noise, seeds, image, mask, stage_noise, guidance_scale, guidance_rescale, uncond,
         conditioning) = given  # fmt: skip
        self.sampler, self.tableau, self.table = sampler, sampler.tableau, table
        self.batch = noise.shape[0]
        if self.tableau.samples not in (None, self.batch):
            raise ValueError(
                f"noise must have the {self.tableau.samples} samples the tableau has "
                f"rows for; got {self.batch}"
            )
        network_dtype = sampler._network_dtype(noise)
        noise = _dense(noise).to(sampler.dtype)
        self.slots = allocate_slots(self.tableau.slots, noise)
        self.views = list(self.slots.unbind(0))
        self.views[0].copy_(noise)
        self._place_image(image, mask)
        self.noise = noise
        self.seeds, self.stage_noise = self._noise_source(seeds, stage_noise)
        self.guidance = self._guidance(guidance_scale, uncond)
        if not 0 <= guidance_rescale <= 1 or (guidance_rescale and not self.guidance):
            raise ValueError(
                "guidance_rescale must be in [0, 1] and come with guidance_scale; "
                f"got {guidance_rescale}"
            )
        self.guidance_rescale = guidance_rescale
        self.conditioning = self._stacked(conditioning, uncond or {})
        copies = 2 if self.guidance else 1
        self.network_input: Tensor | None = None
        if network_dtype != sampler.dtype or self.guidance or self.table.scales_input:
            self.network_input = torch.empty(
                (copies * self.batch, *noise.shape[1:]),
                dtype=network_dtype,
                device=noise.device,
                memory_format=_memory_format(noise),
            )
        # Networks embed times in float32 whatever their own dtype; half precision has too few bits.
        wide = network_dtype == torch.float64
        times = self.table.times.to(torch.float64 if wide else torch.float32)
        times = times.expand(-1, self.batch)
        self.times = torch.cat([times] * copies, dim=1).unbind(0)

    def evaluate(self, number: int) -> Tensor:
        """The network's raw output F at a stage, [B or 2B, ...], dense like the state."""
        x = self.network_input
        if x is None:
            x = self.views[self.tableau.stages[number].sees]
        output = self.sampler.denoiser(x, self.times[number], **self.conditioning)
        return self._checked(output, x, number)

    def launch(self, number: int, output: Tensor | None) -> None:
        """The fused step that follows a stage's evaluation."""
        table, fill = self.table, self.tableau.stages[number].fill
        guidance = self.guidance[number] if self.guidance and output is not None else None
        if output is not None and (self.guidance_rescale or self.sampler.dynamic_threshold):
            output, guidance = self._adjusted(number, output, guidance)
        if table.identity[number] and self.network_input is None and self.mask is None:
            return
        row = table.rows[number]
        if fill is not None:
            row = fill(row, output).to(row.dtype).contiguous()
            self.sampler._count("row filled on the device")
        noise = seeds = None
        if table.stochastic[number]:
            seeds = self.seeds
            noise = self._given_noise() if self.stage_noise is not None else None
        multistep_step_unchecked(
            self.slots,
            output,
            row,
            table.indices[number],
            guidance,
            seeds,
            noise,
            self.network_input,
            *table.variants[number],
        )
        if self.mask is not None:
            self._keep_known(number, self.mask)

    def _adjusted(
        self, number: int, output: Tensor, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output after the extras that no row can hold; guided where it had to be."""
        sampler, quantile = self.sampler, self.sampler.dynamic_threshold
        if guidance is not None:
            output, guidance = rescaled_guidance(output, guidance, self.guidance_rescale), None
            sampler._count("guidance combined by PyTorch (rescale or dynamic threshold)")
        if quantile is not None:
            row = self.table.rows[number]
            x = self.views[self.tableau.stages[number].sees]
            bound = self.tableau.clip[1] if self.tableau.clip else 1.0
            output = thresholded(output, x, (row[:, 0], row[:, 1]), quantile, bound)
            sampler._count("dynamic threshold by PyTorch")
        return output, guidance

    def _keep_known(self, number: int, mask: Tensor) -> None:
        """After a launch: the kept part of the image again, and what the network sees with it."""
        stage = self.tableau.stages[number]
        state = self.views[stage.writes[0].slot]
        keep_known(state, self.known, self.noise, mask, self.table.levels[number])
        if self.network_input is not None:
            scale = self.table.rows[number][:, 4].view(-1, *(1 for _ in state.shape[1:]))
            copies = len(self.network_input) // max(self.batch, 1)
            self.network_input.copy_((scale * state).repeat(copies, *(1 for _ in state.shape[1:])))
        self.sampler._count("kept part of the image blended by PyTorch")

    def _checked(self, output: Tensor, x: Tensor, number: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"denoiser must return a tensor; got {type(output).__name__} (fastdiff.wrap "
                "unpacks what diffusers' networks, tuples and objects with a sample return)"
            )
        if not output.is_floating_point():
            raise TypeError(f"denoiser must return floating-point numbers; got {output.dtype}")
        merge = self.table.merge
        wide = output.ndim == x.ndim > 1 and output.shape[1] == 2 * x.shape[1]
        if merge is not None and wide:
            m0, m1 = (m.view(-1, *(1 for _ in x.shape[1:])) for m in merge[number])
            first, second = output.chunk(2, dim=1)
            output = m0 * first + m1 * second
            self.sampler._count('the two halves of prediction "both" merged by PyTorch')
        elif wide:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            expected = tuple(x.shape)
            if merge is not None:
                expected = (expected[0], 2 * expected[1], *expected[2:])
            raise ValueError(f"denoiser must return {expected}; got {tuple(output.shape)}")
        if output.device != x.device:
            raise ValueError(f"denoiser must return a tensor on {x.device}; got {output.device}")
        if x.numel() and not _same_strides(output, x):
            self.sampler._count("network output copied into the state's memory layout")
            output = output.contiguous(memory_format=_memory_format(x))
        return output

    def _place_image(self, image: Tensor | None, mask: Tensor | None) -> None:
        wanted = self.tableau.from_image or mask is not None
        if wanted != (image is not None):
            raise ValueError(
                "image must be given exactly where the tableau was built with from_image=True "
                "or a mask comes with it"
            )
        self.mask: Tensor | None = None
        if image is None:
            return
        state = self.views[0]
        if image.shape != state.shape or image.device != state.device:
            raise ValueError(
                f"image must be {tuple(state.shape)} on {state.device}; "
                f"got {tuple(image.shape)} on {image.device}"
            )
        if self.tableau.from_image and self.tableau.slots > 1:
            self.views[1].copy_(image)
        if mask is not None:
            try:
                self.mask = mask.to(state).expand_as(state)
            except RuntimeError:
                raise ValueError(
                    f"mask must have shape {tuple(state.shape)} or expand to it; "
                    f"got {tuple(mask.shape)}"
                ) from None
            self.known = image.to(state)

    def _noise_source(
        self, seeds: Tensor | None, stage_noise: Iterable[Tensor] | None
    ) -> tuple[Tensor | None, Any]:
        if not self.tableau.stochastic:
            return None, None
        if stage_noise is not None:
            return None, iter(stage_noise)
        if seeds is None:
            seeds = torch.randint(2**62, (self.batch,)).to(self.slots.device)
        return seeds, None

    def _given_noise(self) -> Tensor:
        noise = next(self.stage_noise, None)
        if noise is None:
            wanted = sum(s.is_stochastic for s in self.tableau.stages)
            raise ValueError(f"stage_noise must hold {wanted} tensors, one per stochastic stage")
        if noise.shape != self.views[0].shape:
            raise ValueError(f"stage_noise must be {tuple(self.views[0].shape)} each; got "
                             f"{tuple(noise.shape)}")  # fmt: skip
        return noise.to(self.slots).contiguous(memory_format=_memory_format(self.views[0]))

    def _guidance(
        self, scale: float | Tensor | None, uncond: dict[str, Any] | None
    ) -> list[Tensor] | None:
        """The guidance scale in force at each stage, [1 or B] on the device."""
        if scale is None:
            if uncond is not None:
                raise ValueError("uncond must come with guidance_scale")
            return None
        scale = torch.as_tensor(scale, dtype=self.sampler.dtype, device=self.slots.device)
        if scale.ndim > 1 or (scale.ndim == 1 and len(scale) not in (1, self.batch)):
            raise ValueError(f"guidance_scale must be a number or a tensor [{self.batch}]; got "
                             f"shape {tuple(scale.shape)}")  # fmt: skip
        scale = scale.reshape(-1).contiguous()
        weights = [stage.guidance for stage in self.tableau.stages]
        return [scale if w == 1 else 1 + w * (scale - 1) for w in weights]

    def _stacked(self, conditioning: dict[str, Any], uncond: dict[str, Any]) -> dict[str, Any]:
        """Conditioning for the doubled batch, the unconditional half first."""
        if not self.guidance:
            return conditioning
        return {
            name: _doubled(name, value, uncond.get(name, value), self.batch)
            for name, value in {**uncond, **conditioning}.items()
        }


def _doubled(name: str, value: Any, other: Any, batch: int) -> Any:
    """Other and value one after the other along the batch, also inside of dicts and sequences.

    What has no batch to stack along is passed as it is, so `other` may not differ there.
    """
    if isinstance(value, Tensor):
        if other is not value and value.ndim and len(value) == 1:
            value = value.expand(batch, *value.shape[1:])
        if value.ndim and len(value) == batch:
            other = torch.as_tensor(other, dtype=value.dtype, device=value.device)
            try:
                return torch.cat([other.expand_as(value), value])
            except RuntimeError:
                raise ValueError(
                    f"uncond[{name!r}] must have shape {tuple(value.shape)} or expand to it; "
                    f"got {tuple(other.shape)}"
                ) from None
    elif isinstance(value, dict):
        parts = {} if other is value else other
        if not isinstance(parts, dict) or parts.keys() - value.keys():
            got = sorted(parts) if isinstance(parts, dict) else type(other).__name__
            raise ValueError(f"uncond[{name!r}] must be a dict with keys of {sorted(value)}; "
                             f"got {got}")  # fmt: skip
        return {k: _doubled(f"{name}.{k}", v, parts.get(k, v), batch) for k, v in value.items()}
    elif isinstance(value, list | tuple) and any(
        isinstance(v, Tensor | dict | list | tuple) for v in value
    ):
        if not isinstance(other, list | tuple) or len(other) != len(value):
            count = len(other) if isinstance(other, list | tuple) else type(other).__name__
            raise ValueError(f"uncond[{name!r}] must have {len(value)} entries; got {count}")
        pairs = zip(value, other, strict=True)
        return type(value)([_doubled(f"{name}.{i}", v, o, batch) for i, (v, o) in enumerate(pairs)])
    if other is not value and (isinstance(value, Tensor) or other != value):
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"uncond[{name!r}] can only replace tensors with a batch of {batch}; the conditional "
            f"one is {what}"
        )
    return value


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


def _memory_format(x: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(x.ndim)
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether each sample of a is laid out as in b (dimensions of size one do not matter)."""
    if a.stride() == b.stride():
        return True
    pairs = zip(a.shape[1:], a.stride()[1:], b.stride()[1:], strict=True)
    return all(n == 1 or s == t for n, s, t in pairs)
