"""A loop as one replay, recorded over buffers of its own and fed by copies.

It is recorded whole, or as its start and one stage (one of each kind, where kinds take turns),
which is replayed with the numbers of each stage in turn: that serves any number of stages, and
leaves room between them for a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.capture.cuda import CudaRecording
from fastdiff.capture.dry_run import DryRecording
from fastdiff.capture.recording import as_it_is, to_be_recorded


class Loop:
    """A recorded function with the buffers it reads.

    Args:
        body: called with the static leaves; must read nothing else that changes.
        leaves: what one call was given; tensors get buffers of the same layout, the rest is fixed.
        tables: tensors that body reads besides: copied into at each start.
        held: whatever else owns tensors that body and stages read (weights), kept alive: a graph
            knows addresses only. Not the body itself: it may own the network, which owns the cache.
        place: of `LoopCache.place`.
        stages: what is replayed after that, in turn, each with the tables that it reads: copied
            into before each replay of it.
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
        self.recordings: list[CudaRecording | DryRecording] = []
        with to_be_recorded():
            self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for call in (lambda: body(self._leaves), *(stage for stage, _ in stages)):
                call()  # lazy initialisation and caches, before anything is recorded
                if device.type == "cuda":
                    self.recordings.append(CudaRecording(call, device, place))
                else:
                    self.recordings.append(DryRecording(call))

    def start(self, leaves: Sequence[Any], tables: Sequence[Tensor]) -> Tensor:
        """Copy a call's tensors in and replay; returns what body returned, overwritten by the next.

        Of a loop recorded with stages, that is what the stages work on.
        """
        with self._here():
            for buffer, leaf in zip(self._leaves, leaves, strict=True):
                if isinstance(buffer, Tensor):
                    buffer.copy_(leaf)
            for buffer, table in zip(self._tables, tables, strict=True):
                buffer.copy_(table)
            self.recordings[0].replay()
        return self.recordings[0].result

    def stage(self, number: int, numbers: Sequence[Tensor]) -> None:
        """Replay the stage of that number, 0 .., with its numbers."""
        turn = number % len(self._numbers)
        with self._here():
            torch._foreach_copy_(self._numbers[turn], list(numbers))
            self.recordings[1 + turn].replay()

    def intermediates(self) -> Iterator[Tensor]:
        """Every tensor that a recorded operation made (on the CPU)."""
        for recording in self.recordings:
            assert isinstance(recording, DryRecording)
            yield from recording.intermediates()

    @property
    def bytes(self) -> int:
        return sum(recording.bytes for recording in self.recordings)

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On the loop's device, whatever mode the caller is in: the buffers are written."""
        on = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on, torch.inference_mode(False), torch.no_grad():
            yield
