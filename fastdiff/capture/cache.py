"""The loops recorded over a network: found, recorded, measured and played."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from fastdiff.capture.loop import Loop, Stages, _Raised
from fastdiff.capture.recordings import CudaRecording

MEASURED_STAGES = 4  # of a loop recorded by the stage, when a replay is compared with the loop
PAYS = 0.99  # a replay must take less than this share of the eager time to be kept


class LoopCache:
    """The loops recorded over one network, least recently used first to go.

    most: how many are kept; memory: bytes they may hold together, None for no bound. Loops on CUDA
    share one memory pool, so they run one at a time, and `play` makes a replay wait for the one
    before, whatever stream that was on. `lock` guards what is kept.
    """

    def __init__(self, most: int = 8, memory: int | None = None) -> None:
        self.most, self.memory = most, memory
        self.lock = threading.Lock()
        # By kind of call and state of the network; or why there is none.
        self.loops: OrderedDict[tuple[Hashable, Hashable], Loop | str] = OrderedDict()
        self._places: dict[torch.device, Any] = {}
        self._keepers: dict[torch.device, CudaRecording] = {}
        self._last: torch.cuda.Event | None = None  # the end of the last replay
        self._turn = threading.Condition()
        self._owner: int | None = None  # the thread whose loop runs
        self._pausing = self._told = False  # it has a callback between stages; which was called

    def place(self, device: torch.device) -> Any:
        """The memory pool and the stream of captures on a device; None on the CPU."""
        if device not in self._places and device.type == "cuda":
            with torch.cuda.device(device), torch.inference_mode(False):
                place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
                # A pool ends with its last graph, and its handle too: one graph is always there.
                keeper = CudaRecording(lambda: torch.zeros(1, device=device), device, place)
            self._places[device], self._keepers[device] = place, keeper
        return self._places.get(device)

    def call(
        self,
        kind: Callable[[], Hashable],
        state: Callable[[], Hashable],
        record: Callable[[], Loop],
        stepwise: Callable[[], Tensor],
        leaves: Sequence[Any],
        tables: Sequence[Tensor] = (),
        stages: Stages | None = None,
        *,
        measure: bool,
        device: torch.device,
    ) -> tuple[Tensor | None, str]:
        """A replay, recorded at the first call of its key; or None and why, after a warning.

        The key is the call's `kind` and the network's `state`. To look at all of a network takes
        the host a while, so the last loop of the kind is replayed meanwhile: its result counts
        where it turns out to be the loop of the key. Whatever a recording meets, the caller can go
        on stepwise. Raised is what `stages.after` raises, and what a replay meets once it was
        called. `measure`: keep a loop only where it is faster than `stepwise`.
        """
        known, failed, raised, recording = None, False, None, False
        with self._in_turn(stages is not None and stages.after is not None) as mine:
            if not mine:
                return None, "another loop is between two of its stages"
            try:
                of_kind = kind()
                likely, result = self._latest(of_kind), None
                if isinstance(likely, Loop) and (stages is None or stages.after is None):
                    result = self.play(likely, leaves, tables, stages)
                known = of_kind, state()
                with self.lock:
                    loop = self.find(known)
                if result is not None and loop is likely:
                    return result, ""
                if loop is None:
                    recording = True
                    loop = recorded = record()
                    recording = False
                    if measure:
                        short = stages and stages._replace(
                            after=None, numbers=stages.numbers[:MEASURED_STAGES]
                        )
                        replay = lambda: self.play(recorded, leaves, tables, short)
                        ratio = faster(stepwise, replay, device)
                        loop = recorded if ratio * PAYS > 1 else f"a replay is {ratio:.2f}x as fast"
                    with self.lock:
                        self.keep(known, loop)
                if isinstance(loop, Loop):
                    return self.play(loop, leaves, tables, stages), ""
                reason = loop
            except _Raised as holder:
                raised = holder.args[0]
            except Exception as error:
                if self._told:  # from the start once more would tell it everything twice
                    raise
                reason, failed = f"{type(error).__name__}: {error}".partition("\n")[0], True
                if recording:
                    self._start_over(device)
                if known is not None:
                    with self.lock:
                        self.keep(known, reason)
        if raised is not None:
            raise raised
        if failed:
            warnings.warn(f"the loop is not captured: {reason}", stacklevel=4)
        return None, reason

    def _start_over(self, device: torch.device) -> None:
        """After a broken capture, which the allocators may take for a running one: a new pool.

        The one of pinned memory goes on refusing captures into the old pool, and serves nobody from
        it, since its condition is that capture. The new pool's first capture, which ends well, puts
        torch's generator right.
        """
        self._places.clear()
        with suppress(Exception):
            self.place(device)

    @contextmanager
    def _in_turn(self, pauses: bool) -> Iterator[bool]:
        """Whether the loops' memory is this thread's; else another's callback has the floor.

        A loop with a callback keeps nobody waiting: who comes between its stages is told so.
        """
        with self._turn:
            me = threading.get_ident()
            while self._owner not in (None, me) and not self._pausing:
                self._turn.wait()
            mine = self._owner is None
            if mine:
                self._owner, self._pausing, self._told = me, pauses, False
        try:
            yield mine
        finally:
            if mine:
                with self._turn:
                    self._owner, self._pausing = None, False
                    self._turn.notify_all()

    def play(
        self,
        loop: Loop,
        leaves: Sequence[Any],
        tables: Sequence[Tensor],
        stages: Stages | None = None,
    ) -> Tensor:
        """A copy of what a loop makes of a call's tensors, in the result's layout."""
        if stages is not None and stages.after is not None:
            stages = stages._replace(after=self._as_now(stages.after, loop.device))
        if loop.device.type != "cuda":
            return loop.run(leaves, tables, stages).clone()
        with torch.cuda.device(loop.device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                return loop.run(leaves, tables, stages).clone()
            finally:
                self._last = stream.record_event()

    def _as_now(
        self, after: Callable[[int, Tensor], None], device: torch.device
    ) -> Callable[[int, Tensor], None]:
        """A callback under the inference mode and on the device that are its caller's now."""
        inference = torch.is_inference_mode_enabled()
        current = torch.cuda.current_device() if device.type == "cuda" else None

        def called(number: int, buffers: Tensor) -> None:
            self._told = True
            place = nullcontext() if current is None else torch.cuda.device(current)
            with torch.inference_mode(inference), torch.no_grad(), place:
                after(number, buffers)

        return called

    def _latest(self, kind: Hashable) -> Loop | str | None:
        """What was found last for a kind of call, whatever the network was then."""
        with self.lock:
            found = (loop for key, loop in reversed(self.loops.items()) if key[0] == kind)
            return next(found, None)

    def find(self, key: tuple[Hashable, Hashable]) -> Loop | str | None:
        """The loop of a key (kind, state), or why there is none; None for a new key."""
        if key in self.loops:
            self.loops.move_to_end(key)
        return self.loops.get(key)

    def keep(self, key: tuple[Hashable, Hashable], loop: Loop | str) -> None:
        """Remember a loop, or why there is none; the oldest make room."""
        self.loops[key] = loop
        while len(self.loops) > self.most or (
            self.memory is not None and self.bytes > self.memory and len(self.loops) > 1
        ):
            self.loops.popitem(last=False)

    @property
    def bytes(self) -> int:
        return sum(loop.bytes for loop in self.loops.values() if isinstance(loop, Loop))


_caches: weakref.WeakKeyDictionary[Any, LoopCache] = weakref.WeakKeyDictionary()


def cache_of(denoiser: Any) -> LoopCache:
    """The cache of a network, shared by all samplers over it; gone with the network.

    Raises TypeError for an object that cannot be a key of a weak dictionary.
    """
    try:
        return _caches.setdefault(denoiser, LoopCache())
    except TypeError as error:
        raise TypeError(f'denoiser must be hashable and weakly referable to be captured ({error}); '
                        'else give capture="never"') from None  # fmt: skip


def captures(mode: str, device: torch.device) -> bool:
    """Whether a loop on this device may be a replay; mode: "auto", "always" or "never".

    Raises ValueError for another mode.
    """
    if mode not in ("auto", "always", "never"):
        raise ValueError(f'capture must be "auto", "always" or "never"; got {mode!r}')
    if mode == "never" or os.environ.get("FASTDIFF_CAPTURE") == "0":
        return False
    if device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()  # else the caller captures
    return mode == "always" and device.type == "cpu"


def faster(eager: Callable[[], Any], replay: Callable[[], Any], device: torch.device) -> float:
    """Eager time over replay time, medians of three each."""
    taken: dict[str, list[float]] = {"eager": [], "replay": []}
    for _ in range(3):
        for name, call in (("eager", eager), ("replay", replay)):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            taken[name].append(time.perf_counter() - start)
    return sorted(taken["eager"])[1] / sorted(taken["replay"])[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
