"""A loop as one replay, recorded over buffers of its own and fed by copies.

It is recorded whole, or as its start and one stage (one of each kind, where kinds take turns),
which is replayed with the numbers of each stage in turn: that serves any number of stages, and
leaves room between them for a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.capture.recordings import CpuRecording, CudaRecording, as_it_is, stance


class Stages(NamedTuple):
    """What a loop recorded as start and stage is fed, stage by stage.

    Attributes:
        numbers: for each stage the tensors copied over the tables that the recorded stage reads.
        result: which of the recorded buffers (along their first dimension) is the result.
        after: called after each stage with its number, 0 .., and the buffers; it may raise. What it
            changes in them is not seen by the stages to come.
    """

    numbers: Sequence[Sequence[Tensor]]
    result: int
    after: Callable[[int, Tensor], None] | None = None


class _Raised(Exception):
    """Holds what `Stages.after` raised: the caller's own, and no fault of the replay."""


class Loop:
    """A recorded function with the buffers it reads.

    Args:
        body: called with the static leaves; must read nothing else that changes.
        stages: what is replayed after that for the `Stages` of a run, in turn, each with the tables
            that it reads: copied into before each replay of it.
        leaves: what one call was given; tensors get buffers of the same layout, the rest is fixed.
        tables: tensors that body reads besides: copied into at each run.
        held: whatever else owns tensors that body and stages read (weights), kept alive: a graph
            knows addresses only. Not the body itself: it may own the network, which owns the cache.
        place: of `LoopCache.place`.
    """

    def __init__(
        self,
        body: Callable[[list[Any]], Tensor],
        leaves: Sequence[Any],
        tables: Sequence[Tensor],
        held: Sequence[Any],
        device: torch.device,
        place: Any = None,
        *,
        stages: Sequence[tuple[Callable[[], Tensor], Sequence[Tensor]]] = (),
    ) -> None:
        self.device, self._tables = device, list(tables)
        self._numbers = [list(numbers) for _, numbers in stages]
        # Weights may be given other memory later: what is kept is the one that they have now.
        self.held = [as_it_is(owner) for owner in held]
        cast_cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would keep copies of the weights as they are
        try:
            self._record(body, [stage for stage, _ in stages], leaves, place)
        finally:
            torch.set_autocast_cache_enabled(cast_cache)

    def _record(
        self,
        body: Callable[[list[Any]], Tensor],
        stages: Sequence[Callable[[], Tensor]],
        leaves: Sequence[Any],
        place: Any,
    ) -> None:
        # Tensors of inference mode could not be written later. Nor may a recording in another
        # thread make this one's compiled code run as Python.
        with torch.inference_mode(False), torch.no_grad(), stance:
            self._leaves = [_buffer(leaf) for leaf in leaves]
            self.recordings = []
            for call in (lambda: body(self._leaves), *stages):
                call()  # lazy initialisation and caches, before anything is recorded
                self.recordings.append(self._recording(call, place))

    def _recording(self, call: Callable[[], Tensor], place: Any) -> CpuRecording | CudaRecording:
        if self.device.type == "cuda":
            return CudaRecording(call, self.device, place)
        return CpuRecording(call)

    def run(
        self, leaves: Sequence[Any], tables: Sequence[Tensor], stages: Stages | None = None
    ) -> Tensor:
        """Copy a call's tensors in, replay, and return the result: overwritten by the next run."""
        with torch.inference_mode(False), torch.no_grad():
            for buffer, leaf in zip(self._leaves, leaves, strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(leaf)
            for buffer, table in zip(self._tables, tables, strict=True):
                buffer.copy_(table)
            self.recordings[0].replay()
            result = self.recordings[0].result
            return result if stages is None else self._run_stages(stages, result)

    def _run_stages(self, stages: Stages, buffers: Tensor) -> Tensor:
        for number, numbers in enumerate(stages.numbers):
            turn = number % len(self._numbers)
            torch._foreach_copy_(self._numbers[turn], list(numbers))
            self.recordings[1 + turn].replay()
            if stages.after is not None:
                try:
                    stages.after(number, buffers)
                except Exception as error:
                    raise _Raised(error) from None
        return buffers[stages.result]

    def intermediates(self) -> Iterator[Tensor]:
        """Every tensor that a recorded operation made (on the CPU)."""
        for recording in self.recordings:
            assert isinstance(recording, CpuRecording)
            yield from recording.intermediates()

    @property
    def bytes(self) -> int:
        return sum(recording.bytes for recording in self.recordings)


def _buffer(leaf: Any) -> Any:
    """A tensor of the same layout (a dense one, if that is not), and for now the same content."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
