"""One run of a tableau over a denoiser: its numbers and buffers on a device, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff.capture import NotCapturable
from fastdiff.execution.nonlinear import keep_known, rescaled_guidance, thresholded
from fastdiff.ops import (
    SpectralGains,
    allocate_slots,
    multistep_step_unchecked,
    spectral_filter,
    spectral_update_unchecked,
)
from fastdiff.ops.common import clamped
from fastdiff.ops.half_spectrum import step_row
from fastdiff.ops.multistep_step import stage_noise as drawn_noise
from fastdiff.tableau import Stage, Tableau

LONGEST_PERIOD = 8  # recorded stages of a loop whose stages are of several kinds


class Given(NamedTuple):
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


class Table:
    """A tableau on a device: its numbers uploaded once, and what the loop asks of each stage.

    gains: what its moves pass through; the launches then store what comes of them.
    Raises ValueError for gains where a stage is no move.
    """

    def __init__(
        self,
        tableau: Tableau,
        dtype: torch.dtype,
        device: torch.device,
        gains: SpectralGains | None = None,
    ) -> None:
        self.tableau, self.dtype, self.gains = tableau, dtype, gains
        stages, numbers = tableau.stages, range(len(tableau.stages))
        self.buffers: list[Tensor] = []  # all of its numbers; another table's may be copied in
        launched = tableau if gains is None else tableau.carried()
        self.rows = self._upload([launched.row(i) for i in numbers], dtype, device)
        self.indices = self._upload([launched.index(i) for i in numbers], torch.int32, device)
        self.variants = [(launched.read_width(i), len(stages[i].writes)) for i in numbers]
        self.moves: list[Tensor] | None = None  # e, b, a, c of each
        self.moves_sample, self.moves_state = False, False  # whether an e, a b is not zero
        if gains is not None or any(stage.langevin is not None for stage in stages):
            moves = [tableau.move(i) if stages[i].is_move else np.zeros((1, 4)) for i in numbers]
            self.moves = self._upload(moves, dtype, device)
            self.moves_sample, self.moves_state = (
                any(bool(move[:, column].any()) for move in moves[1:]) for column in (0, 1)
            )
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
        self.structure: tuple[Any, ...] = (
            tuple(self.variants), tuple(self.identity), tuple(self.stochastic), self.scales_input,
            tuple((stage.sees, stage.writes[0].slot, stage.time is None, stage.guidance,
                   stage.fill, _norms(stage)) for stage in stages),
            gains, self.moves_sample, self.moves_state,
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


class StageTable(Table):
    """The table of a tableau in which a stage can stand in the place of others.

    All launches are padded to the widest one, so that which stage it is are numbers alone; a
    recording of stage 1 then runs whatever stage is copied over it. Where kinds of stages take
    turns, as predictors and correctors do, stage 1 + j serves the stages j + `period`, ....

    Raises:
        NotCapturable: a stage differs from the others in more than numbers; says in what.
    """

    def __init__(
        self,
        tableau: Tableau,
        dtype: torch.dtype,
        device: torch.device,
        gains: SpectralGains | None = None,
    ) -> None:
        stages = tableau.stages[1:]
        if any(stage.fill is not None for stage in tableau.stages):
            raise NotCapturable("a row is filled on the device")
        if any(stage.time is None for stage in stages) or not stages:
            raise NotCapturable("a stage has no evaluation")
        if len({stage.guidance for stage in stages}) > 1:
            raise NotCapturable("guidance differs from stage to stage")
        self.period = _period([_norms(stage) for stage in stages])
        super().__init__(tableau.padded(), dtype, device, gains)
        count = len(tableau.stages)
        self.identity, self.scales_input = [False] * count, True  # each writes the network's input
        self.stochastic = [tableau.stochastic] * count
        moves = [[move] for move in self.moves] if self.moves else [[]] * count
        parts = [[self.rows[i], self.indices[i], self.times[i], *moves[i],
                  *(self.merge or [[]] * count)[i]] for i in range(count)]  # fmt: skip
        shapes = {tuple(part.shape for part in stage) for stage in parts}
        if len(shapes) > 1:
            raise NotCapturable("numbers of a stage are per sample, and those of others are not")
        self._pack(parts)
        self.structure = (
            self.variants[1], tableau.stochastic, stages[0].guidance, self.tableau.slots,
            tableau.samples, tableau.from_image, self.merge is None,
            gains, self.moves_sample, self.moves_state,
            tuple(_norms(stage) for stage in stages[: self.period]), *shapes,
        )  # fmt: skip

    def _pack(self, parts: list[list[Tensor]]) -> None:
        """Move the numbers of each stage into one row of bytes: one copy brings them all."""
        sizes = [-(-part.nbytes // 8) * 8 for part in parts[0]]
        width = -(-sum(sizes) // 64) * 64
        packed = torch.zeros((len(parts), width), dtype=torch.uint8, device=self.times.device)
        self.numbers = packed.unbind(0)
        moved = []
        for row, stage in zip(self.numbers, parts, strict=True):
            places, views = row.split([*sizes, width - sum(sizes)]), []
            for place, part in zip(places[:-1], stage, strict=True):
                views.append(place[: part.nbytes].view(part.dtype).view(part.shape).copy_(part))
            moved.append(views)
        self.rows, self.indices = [views[0] for views in moved], [views[1] for views in moved]
        start, length = sum(sizes[:2]), parts[0][2].nbytes
        self.times = packed[:, start : start + length].view(self.times.dtype)
        if self.moves is not None:
            self.moves = [views[3] for views in moved]
        if self.merge is not None:
            self.merge = [views[-2:] for views in moved]


def _norms(stage: Stage) -> str:
    """How a stage finds its step; "": it is given."""
    if stage.langevin is None:
        return ""
    return "batch" if stage.langevin.per_batch else "sample"


def _period(kinds: list[str]) -> int:
    """The least number after which the kinds repeat."""
    for period in range(1, LONGEST_PERIOD + 1):
        if all(kind == kinds[i - period] for i, kind in enumerate(kinds) if i >= period):
            return period
    raise NotCapturable(f"the kinds of its stages do not repeat within {LONGEST_PERIOD}")


class Run:
    """One call of a sampler: its buffers, and the two halves of a stage.

    network_dtype: what the denoiser is fed. count: told of whatever does not go through the fused
    launch.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        given: Given,
        table: Table,
        network_dtype: torch.dtype,
        dynamic_threshold: float | None,
        count: Callable[[str], None],
    ) -> None:
        (noise, seeds, image, mask, stage_noise, guidance_scale, guidance_rescale, uncond,
         conditioning) = given  # fmt: skip
        self.denoiser, self.tableau, self.table = denoiser, table.tableau, table
        self.dynamic_threshold, self.count = dynamic_threshold, count
        self.batch = noise.shape[0]
        if self.tableau.samples not in (None, self.batch):
            raise ValueError(
                f"noise must have the {self.tableau.samples} samples the tableau has "
                f"rows for; got {self.batch}"
            )
        noise = _dense(noise).to(table.dtype)
        self.slots = allocate_slots(self.tableau.slots, noise)
        self.views = list(self.slots.unbind(0))
        self.views[0].copy_(noise if table.gains is None else _coloured(noise, table.gains))
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
        if network_dtype != table.dtype or self.guidance or self.table.scales_input:
            self.network_input = torch.empty(
                (copies * self.batch, *noise.shape[1:]),
                dtype=network_dtype,
                device=noise.device,
                memory_format=_memory_format(noise),
            )
        # Networks embed times in float32 whatever their own dtype; half precision has too few bits.
        wide = network_dtype == torch.float64
        self.time_dtype = torch.float64 if wide else torch.float32
        self.read_times()

    def tensors(self) -> list[Tensor]:
        """All tensors that its stages read or write."""
        return [leaf for leaf in tree_leaves(vars(self)) if isinstance(leaf, Tensor)]

    def read_times(self) -> None:
        """What the network is told, from the times of the table."""
        times = self.table.times.to(self.time_dtype).expand(-1, self.batch)
        self.times = torch.cat([times] * (2 if self.guidance else 1), dim=1).unbind(0)

    def evaluate(self, number: int) -> Tensor:
        """The network's raw output F at a stage, [B or 2B, ...], dense like the state."""
        x = self.network_input
        if x is None:
            x = self.views[self.tableau.stages[number].sees]
        output = self.denoiser(x, self.times[number], **self.conditioning)
        return self._checked(output, x, number)

    def launch(self, number: int, output: Tensor | None) -> None:
        """The fused step that follows a stage's evaluation."""
        table, fill = self.table, self.tableau.stages[number].fill
        guidance = self.guidance[number] if self.guidance and output is not None else None
        if output is not None and (self.guidance_rescale or self.dynamic_threshold):
            output, guidance = self._adjusted(number, output, guidance)
        if table.identity[number] and self.network_input is None and self.mask is None:
            return
        row = table.rows[number]
        if fill is not None:
            row = fill(row, output).to(row.dtype).contiguous()
            self.count("row filled on the device")
        noise = seeds = None
        if table.stochastic[number]:
            seeds = self.seeds
            noise = self._given_noise() if self.stage_noise is not None else None
        norms = _norms(self.tableau.stages[number])
        if number and (table.gains is not None or norms):
            if output is not None and guidance is not None:
                output, guidance = rescaled_guidance(output, guidance, 0.0), None
                self.count("guidance combined by PyTorch before a move")
            if table.gains is not None:
                output = self._moved(number, output, table.gains, seeds, noise, norms)
                noise = seeds = None
            else:
                row, noise = self._stepped(number, output, seeds, noise, norms)
                seeds = None
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

    def _moved(
        self,
        number: int,
        output: Tensor | None,
        gains: SpectralGains,
        seeds: Tensor | None,
        noise: Tensor | None,
        norms: str,
    ) -> Tensor:
        """The state after a stage's move through the gains."""
        assert self.table.moves is not None
        x, move = self.views[self.tableau.stages[number].sees], self.table.moves[number]
        if output is None or self.table.moves_sample:
            output = self._direction(number, output)
            move = torch.cat([torch.ones_like(move[:, :1]), move[:, 3:]], 1)
        else:
            move = move[:, 1:] if self.table.moves_state else move[:, 2:]
        stage = self.table.indices[number][:1]
        return spectral_update_unchecked(
            x, output, gains, move.contiguous(), seeds, stage, 0, noise, "exact", norms or "given"
        )

    def _stepped(
        self,
        number: int,
        output: Tensor | None,
        seeds: Tensor | None,
        noise: Tensor | None,
        norms: str,
    ) -> tuple[Tensor, Tensor]:
        """The row of a Langevin step, its length found, and its noise."""
        assert self.table.moves is not None
        x = self.views[self.tableau.stages[number].sees]
        if noise is None:
            assert seeds is not None
            noise = drawn_noise(x, seeds, self.table.indices[number][:1])
        e, b, a, factor = self.table.moves[number].unbind(1)
        direction = self._direction(number, output)
        # One axis more: samples may be numbers, and a batch may be empty.
        squares = [t[..., None].flatten(1).square().sum(1) for t in (direction, noise)]
        h, root = step_row(torch.stack(squares, 1), factor, norms).unbind(1)
        row = self.table.rows[number].expand(self.batch, -1).clone()
        for column, value in zip((5, 6, 7, 8), (h * e, h * a, root, 1 + h * b), strict=True):
            row[:, column] = value  # of x0, F, z and x
        self.count("length of a Langevin step found by PyTorch")
        return row, noise

    def _direction(self, number: int, output: Tensor | None) -> Tensor:
        """b x + e x0 + a F of a stage's move, [B, ...]."""
        assert self.table.moves is not None
        x = self.views[self.tableau.stages[number].sees]
        apart = (-1, *(1 for _ in x.shape[1:]))
        e, b, a, _ = (c.view(apart) for c in self.table.moves[number].unbind(1))
        direction = b * x
        if output is not None:
            model = output.to(x.dtype)
            direction = direction + a * model
            if self.table.moves_sample:
                p, q, low, high = (c.view(apart) for c in self.table.rows[number][:, :4].unbind(1))
                direction = direction + e * clamped(p * model + q * x, low, high)
        return direction

    def _adjusted(
        self, number: int, output: Tensor, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output after the extras that no row can hold; guided where it had to be."""
        quantile = self.dynamic_threshold
        if guidance is not None:
            output, guidance = rescaled_guidance(output, guidance, self.guidance_rescale), None
            self.count("guidance combined by PyTorch (rescale or dynamic threshold)")
        if quantile is not None:
            row = self.table.rows[number]
            x = self.views[self.tableau.stages[number].sees]
            bound = self.tableau.clip[1] if self.tableau.clip else 1.0
            output = thresholded(output, x, (row[:, 0], row[:, 1]), quantile, bound)
            self.count("dynamic threshold by PyTorch")
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
        self.count("kept part of the image blended by PyTorch")

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
            self.count('the two halves of prediction "both" merged by PyTorch')
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
            self.count("network output copied into the state's memory layout")
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
        scale = torch.as_tensor(scale, dtype=self.table.dtype, device=self.slots.device)
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


def _coloured(noise: Tensor, gains: SpectralGains) -> Tensor:
    """M z: the noise that a preconditioned run begins with."""
    fits = noise.ndim == 4 and gains.channels in (1, noise.shape[1])
    if not fits or noise.shape[2:] != gains.size:
        raise ValueError(
            f"noise must be [B, {gains.channels}, {gains.size[0]}, {gains.size[1]}], which the "
            f"preconditioner is for; got {tuple(noise.shape)}"
        )
    z = noise if gains.pixel is None else gains.pixel.to(noise.dtype) * noise
    return spectral_filter(z, gains.gain)


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
