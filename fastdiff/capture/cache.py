"""The loops recorded over a network: found again, recorded, and played one at a time."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastdiff.capture.cuda import CudaRecording
from fastdiff.capture.fingerprint import NetworkWatch
from fastdiff.capture.loop import Loop

WAIT = 0.05  # seconds between two looks at whether the loop that runs is one with callbacks


class LoopCache:
    """The loops recorded over one network, least recently used first to go.

    most: how many are kept; memory: bytes they may hold together, None for no bound. Loops on CUDA
    share one memory pool, so they run one at a time (`turn`). `lock` guards what is kept; `network`
    says whether the network is still what it was.
    """

    def __init__(self, network: Any, most: int = 8, memory: int | None = None) -> None:
        self.network, self.most, self.memory = NetworkWatch(network), most, memory
        self.lock = threading.Lock()
        self.loops: OrderedDict[Hashable, Loop | str] = OrderedDict()  # or why there is none
        self._places: dict[torch.device, Any] = {}
        self._keepers: dict[torch.device, CudaRecording] = {}
        self._last: torch.cuda.Event | None = None  # the end of the last replay
        self._running, self._pauses = threading.Lock(), False

    @contextmanager
    def turn(self, device: torch.device, pauses: bool) -> Iterator[bool]:
        """Whether the loops' memory is the caller's for this block; else it goes on without them.

        pauses: the block calls back between stages. It then keeps nobody waiting: who comes in the
        meantime, from another thread or from the callback, is told no.
        """
        mine = False
        while not (mine or self._pauses):
            mine = self._running.acquire(timeout=WAIT)
        if not mine:
            yield False
            return
        self._pauses = pauses
        try:
            if device.type != "cuda":
                yield True
                return
            stream = torch.cuda.current_stream(device)
            if self._last is not None:  # whatever stream that replay was on
                stream.wait_event(self._last)
            try:
                yield True
            finally:
                self._last = stream.record_event()
        finally:
            self._pauses = False
            self._running.release()

    def find(self, key: Hashable) -> Loop | str | None:
        """The loop of a key, or why there is none; None for a new key."""
        with self.lock:
            if key in self.loops:
                self.loops.move_to_end(key)
            return self.loops.get(key)

    def keep(self, key: Hashable, loop: Loop | str) -> None:
        """Remember a loop, or why there is none; the oldest make room."""
        with self.lock:
            self.loops[key] = loop
            while len(self.loops) > self.most or (
                self.memory is not None and self.bytes > self.memory and len(self.loops) > 1
            ):
                self.loops.popitem(last=False)

    def record(self, key: Hashable, device: torch.device, make: Callable[[Any], Loop]) -> Loop:
        """Make a loop in this cache's place on the device (None on the CPU), and keep it."""
        try:
            loop = make(self._place(device))
        except Exception:
            self._start_over(device)
            raise
        self.keep(key, loop)
        return loop

    def give_up(self, key: Hashable | None, error: Exception) -> str:
        """Why there is no replay, after a warning; remembered where the key is known."""
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if key is not None:
            self.keep(key, reason)
        warnings.warn(f"the loop is not captured: {reason}", stacklevel=5)
        return reason

    def _place(self, device: torch.device) -> Any:
        """The memory pool and the stream of captures on a device; None on the CPU."""
        if device not in self._places and device.type == "cuda":
            with torch.cuda.device(device), torch.inference_mode(False):
                place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
                # torch frees a pool with its last graph, and its handle is void then. This empty
                # graph stays, so that the pool outlives the loops.
                keeper = CudaRecording(lambda: torch.zeros(1, device=device), device, place)
            self._places[device], self._keepers[device] = place, keeper
        return self._places.get(device)

    def _start_over(self, device: torch.device) -> None:
        """After a broken capture, which the allocators may take for a running one: a new pool.

        The one of pinned memory goes on refusing captures into the old pool, and serves nobody from
        it, since its condition is that capture. The new pool's first capture, which ends well, puts
        torch's generator right.
        """
        self._places.clear()
        with suppress(Exception):
            self._place(device)

    @property
    def bytes(self) -> int:
        return sum(loop.bytes for loop in self.loops.values() if isinstance(loop, Loop))


_caches: weakref.WeakKeyDictionary[Any, LoopCache] = weakref.WeakKeyDictionary()


def cache_of(network: Any) -> LoopCache:
    """The cache of a network, shared by all that run over it; gone with the network.

    Raises TypeError for an object that cannot be a key of a weak dictionary.
    """
    try:
        found = _caches.get(network)
        return _caches.setdefault(network, LoopCache(network)) if found is None else found
    except TypeError as error:
        raise TypeError(
            f"denoiser must be hashable and weakly referable to be captured ({error}); "
            'else give capture="never"'
        ) from None


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
