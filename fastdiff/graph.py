"""A function of tensors as one replay: recorded once over fixed buffers, fed by copies.

A loop is recorded whole, or as its start and one stage (one of each kind, where kinds take turns),
which is replayed with the numbers of each stage in turn: that serves any number of stages, and
leaves room between them for a callback.

On CUDA the recording is a CUDA graph. On the CPU it is the list of PyTorch operations with the very
tensors they ran on, issued again in order: slower than the function, and a proof that nothing of it
depends on Python, on addresses that move or on numbers that were read by the host.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MEASURED_STAGES = 4  # of a loop recorded by the stage, when a replay is compared with the loop
WARM_UPS = 2  # runs before a capture: lazy initialisation, autotuning, compilation
PAYS = 0.99  # a replay must take less than this share of the eager time to be kept

_stance = threading.RLock()  # held while compiled code runs as Python, and while it is recorded


class NotCapturable(RuntimeError):
    """What an operation does cannot be repeated by a replay."""


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


class CpuRecording:
    """The operations of a function on CPU tensors.

    Attributes:
        result: what the function returned; a replay writes it anew, at the same address.
    """

    def __init__(self, body: Callable[[], Tensor]) -> None:
        recorder = _Recorder()
        with compiled_as_written(), recorder:
            self.result = body()
        self._steps = recorder.steps

    def replay(self) -> None:
        for func, args, kwargs, fresh in self._steps:
            results = func(*args, **kwargs)
            for kept, new in zip(fresh, _fresh(func, results), strict=True):
                kept.copy_(new)

    def intermediates(self) -> Iterator[Tensor]:
        """Every tensor that an operation of the function made."""
        for _, _, _, fresh in self._steps:
            yield from fresh

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.intermediates())


class CudaRecording:
    """The same as a CUDA graph, captured in thread-local mode.

    place: the memory pool and the stream of its captures. The graph knows addresses only: it keeps
    what operations of a warm-up read, and whoever makes it what else it needs.
    """

    def __init__(self, body: Callable[[], Tensor], device: torch.device, place: Any) -> None:
        pool, aside = place
        with torch.cuda.device(device):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    body()
                with compiled_as_written(), Reader() as reader:
                    body()
            self._read = reader.foreign()  # tables in attributes, caches: kept alive
            stream = torch.cuda.current_stream()
            stream.wait_stream(aside)
            torch.cuda.synchronize()
            # cuBLAS's workspace goes into the pool: others may free the one of the warm-up.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            self._graph = torch.cuda.CUDAGraph()
            # torch makes the generator's two tensors for graphs when the first living graph
            # registers, in the mode of that moment: here not as inference tensors, which captures
            # and replays of others could not write. Others may have made them so before: that is
            # why ours begin a capture, and replay, in inference mode, which may write both kinds.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            self._graph.register_generator_state(generator)
            try:
                # The stream is given: the default one belongs to the device that captured first.
                with (
                    torch.inference_mode(),
                    torch.cuda.graph(
                        self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"
                    ),
                    torch.inference_mode(False),
                    torch.no_grad(),
                ):
                    self.result = body()
            except BaseException:  # a capture that breaks off may leave both as they were in it
                torch.cuda.set_stream(stream)
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                raise
            self.bytes = max(torch.cuda.memory_reserved() - before, 0)

    def replay(self) -> None:
        with torch.inference_mode():
            self._graph.replay()


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
        self.held = [_as_it_is(owner) for owner in held]
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
        with torch.inference_mode(False), torch.no_grad(), _stance:
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


def network_state(
    network: Any, device: torch.device, *, adapters: bool = False
) -> tuple[list[Tensor], Hashable]:
    """What a recording fixes of a network: its weights, whose memory is to be kept, and a key.

    The key has addresses and dtypes of parameters and buffers, classes, own forwards and attention
    processors of the modules, train or eval mode, hooks, FreeU's numbers, autocast and the
    precision of float32 products. adapters: whether adapter layers are allowed, whose own state it
    lacks.
    Raises NotCapturable for weights that are moved about (an offloading hook), and for adapters.
    """
    weights: list[Tensor] = []
    key: list[Any] = [torch.is_autocast_enabled(device.type),
                      torch.get_autocast_dtype(device.type),
                      torch.get_float32_matmul_precision()]  # fmt: skip
    waiting = [network] if isinstance(network, nn.Module) else []
    while waiting:
        module = waiting.pop()
        own = vars(module)
        if "_hf_hook" in own:
            raise NotCapturable(f"{type(module).__name__} has an offloading hook")
        if not adapters and type(module).__module__.startswith("peft."):
            raise NotCapturable(f"{type(module).__name__} is an adapter's layer: fuse and unload "
                                "it, or give capture_key=")  # fmt: skip
        key += (type(module), module.training)
        # By weak reference: an id may be another's later, and they may own the network.
        if "forward" in own or "processor" in own:
            key += [weakref.ref(own[name]) for name in ("forward", "processor") if name in own]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                key += map(weakref.ref, hooks.values())
        if own.get("s1") is not None:
            key.append(tuple(own.get(name) for name in ("s1", "s2", "b1", "b2")))
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None:
                    weights.append(tensor)
                    key += (tensor.data_ptr(), tensor.dtype)
        waiting += [child for child in module._modules.values() if child is not None]
    return weights, tuple(key)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def leaf_key(leaf: Any) -> Hashable:
    """What a recording fixes of an argument: the layout of a tensor, the value of a plain one.

    Raises NotCapturable for anything else: what it holds may change.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if not isinstance(leaf, PLAIN):
        raise NotCapturable(f"an argument is a {type(leaf).__name__}, not a tensor or plain value")
    return type(leaf), leaf


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


@contextmanager
def compiled_as_written() -> Iterator[None]:
    """What torch.compile made runs as the Python it was made of.

    For a mode that sees operations: under one, compiled code is passed over, and with
    fullgraph=True it raises and goes on raising afterwards.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        yield
        return
    with _stance, torch.compiler.set_stance("force_eager"):  # of all threads: one at a time
        yield


# == Recording on the CPU ==========================================================================

Step = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


class Reader(TorchDispatchMode):
    """Collects the tensors that operations read and did not make: tables in attributes, caches."""

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()
        self._read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._made:
                    self._read.setdefault(storage._cdata, leaf.detach())
        results = func(*args, **kwargs)
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._read:
                    self._made.add(storage._cdata)
        return results

    def foreign(self) -> list[Tensor]:
        return list(self._read.values())


class _Recorder(TorchDispatchMode):
    """Lists the operations that a replay has to issue, with the tensors they made."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = func.overloadpacket.__name__.startswith("index") and _has_mask(args)
        read = torch.Tag.data_dependent_output in func.tags
        if read or masked or _shape_of_data(func):
            raise NotCapturable(f"{func} reads data on the host or sizes a tensor by it")
        results = func(*args, **kwargs)
        fresh = list(_fresh(func, results))
        empty = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        written = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if (fresh and not empty) or written:
            # As they are now: a later operation may give them another shape in place.
            args, kwargs = tree_map(_as_it_is, (args, kwargs))
            self.steps.append((func, args, kwargs, [_as_it_is(t) for t in fresh]))
        return results


def _fresh(func: Any, results: Any) -> Iterator[Tensor]:
    """Those results of an operation that are neither views nor written arguments."""
    listed = results if isinstance(results, (tuple, list)) else (results,)
    returns = func._schema.returns
    if len(returns) == 1 and isinstance(results, list):  # one list of tensors
        listed, returns = results, returns * len(results)
    for result, declared in zip(listed, returns, strict=False):
        if isinstance(result, Tensor) and declared.alias_info is None:
            yield result


def _as_it_is(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _has_mask(args: Iterable[Any]) -> bool:
    indices = next((a for a in args if isinstance(a, (list, tuple))), ())
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _shape_of_data(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return torch.Tag.dynamic_output_shape in func.tags and not name.startswith("index")


def _buffer(leaf: Any) -> Any:
    """A tensor of the same layout (a dense one, if that is not), and for now the same content."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
