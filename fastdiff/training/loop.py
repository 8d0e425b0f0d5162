"""The training loop of every trainer here: denoising, distillation, predictors, multi-scale.

Nothing random lives between two steps. The batch of step n, its noise and its times come from
(seed, n), dropout from (seed, n, rank); so a checkpoint holds weights and counters only, and a run
that was stopped and resumed equals one that was not, on the CPU bit for bit (same number of
threads).

Data parallel: under `torchrun`, once `torch.distributed.init_process_group` was called, every
process builds the same global batch, works on its own contiguous share and averages the gradients.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.files import read_tensors, write_tensors

Batch = dict[str, Tensor]
"""Tensors of one step. Those with dimensions share their first one, the batch; scalars are for
everyone.
"""

Batches = Callable[[int, torch.Generator], Batch]
"""(step, generator) -> the global batch of that step, all its noise and times included, on the
module's device.
"""

Loss = Callable[[nn.Module, Batch], Tensor]
"""(module, batch) -> scalar, the mean over the batch."""

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train.

    steps: optimiser steps in all, those before a resume included.
    seed: what batches and dropout are derived from.
    ema_decay: per-step decay of the averaged weights, reached from below as (1 + n) / (10 + n).
    clip_norm: largest gradient norm; None does not clip.
    amp: "bfloat16" or "float16" (with loss scaling) runs the loss under autocast; None does not.
    log_every: steps between two entries of the history.
    evaluate_every: steps between two evaluations; the last step is evaluated too.
    save_every: steps between two checkpoints; the last step is saved too.
    keep_best: a key of what `evaluate` returns; the averaged weights that minimise it are kept in
        `best.safetensors`.
    """

    steps: int
    seed: int = 0
    ema_decay: float = 0.999
    clip_norm: float | None = 1.0
    amp: str | None = None
    log_every: int = 100
    evaluate_every: int = 1000
    save_every: int = 1000
    keep_best: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {self.clip_norm}")
        if self.amp not in (None, "bfloat16", "float16"):
            raise ValueError(f"amp must be None, 'bfloat16' or 'float16', got {self.amp!r}")


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint's JSON.

    history: one dictionary per logged or evaluated step: "step", "loss" (mean since the entry
        before), "learning_rate", and what `evaluate` returned.
    loss_sum, loss_count: the mean under way.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    loss_sum: float = 0.0
    loss_count: int = 0


@dataclass
class Trained:
    """What `train` returns: the weights as last stepped, their average, and how they came about."""

    module: nn.Module
    ema: nn.Module
    progress: Progress


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: Batches,
    config: LoopConfig,
    *,
    learning_rate: Callable[[int], float] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Trained:
    """Train `module` in place until `config.steps`.

    learning_rate: factor on the optimiser's own rates at a step, 0..steps-1; None leaves them
        alone.
    evaluate: from the averaged weights (in eval mode, without gradients) to named numbers for the
        history.
    out: folder for checkpoints, seen by all processes; None writes nothing.
    resume: continue from the checkpoint in `out` if there is one.
    progress: show a bar.

    An interrupt (Ctrl-C) or SIGTERM lets the step finish, saves, and then takes its usual course; a
    second one does so at once. Raises FloatingPointError when the loss is no longer finite (the
    last checkpoint stays), ValueError for a checkpoint of another run.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(module.parameters()).device
    generator = torch.Generator(device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
    base_rates = [group["lr"] for group in optimizer.param_groups]
    folder = None if out is None else Path(out)

    if world > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)
    ema = copy.deepcopy(module).requires_grad_(False).eval()
    state = Progress()
    if folder is not None and resume and (folder / CHECKPOINT).exists():
        state = _restore(folder / CHECKPOINT, module, ema, optimizer, scaler, config)

    def save() -> None:
        if folder is not None and rank == 0:
            _save(folder / CHECKPOINT, module, ema, optimizer, scaler, config, state)

    # Kept on the device: to read it at every step would be to wait for every step.
    running = torch.tensor(state.loss_sum, dtype=torch.float64, device=device)

    def settle() -> None:
        state.loss_sum = float(running)
        if not math.isfinite(state.loss_sum):
            raise FloatingPointError(f"the loss is not finite near step {state.step}")

    module.train()
    with (
        _deferred_signals() as pending,
        _fork_rng(device),
        _bar(config, state, progress, rank) as bar,
    ):
        while state.step < config.steps:
            step = state.step
            factor = 1.0 if learning_rate is None else learning_rate(step)
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            generator.manual_seed(derive_seed(config.seed, step))
            batch = _share(batches(step, generator), rank, world)
            torch.manual_seed(derive_seed(config.seed, step, rank + 1))  # dropout draws from here

            optimizer.zero_grad(set_to_none=True)
            with _autocast(device, config.amp):
                value = loss(module, batch)
            scaler.scale(value).backward()
            value, stop = value.detach(), bool(pending)
            if world > 1:
                value, stop = _average(module, value, stop, world)
            if config.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            _update_ema(ema, module, min(config.ema_decay, (1 + step) / (10 + step)))

            state.step = step + 1
            running += value
            state.loss_count += 1
            last = state.step == config.steps
            entry: dict[str, float] = {}
            if state.step % config.log_every == 0 or last:
                settle()
                entry["loss"] = state.loss_sum / state.loss_count
                entry["learning_rate"] = optimizer.param_groups[0]["lr"]
                running.zero_()
                state.loss_count = 0
            if evaluate is not None and (state.step % config.evaluate_every == 0 or last):
                with torch.no_grad():
                    entry |= evaluate(ema)
            if entry:
                state.history.append({"step": state.step, **entry})
                bar.set_postfix({k: f"{v:.4g}" for k, v in entry.items() if k != "learning_rate"})
            if config.keep_best is not None and config.keep_best in entry:
                if state.best is None or entry[config.keep_best] < state.best[config.keep_best]:
                    state.best = state.history[-1]
                    if folder is not None and rank == 0:
                        write_tensors(
                            folder / BEST, ema.state_dict(), {"progress": state.best}, beside=True
                        )
            bar.update()
            if state.step % config.save_every == 0 or last or stop:
                settle()
                save()
            if stop:
                break
    for number in pending:
        signal.raise_signal(number)
    if state.step < config.steps:
        raise KeyboardInterrupt("another process of this run was interrupted")
    return Trained(module, ema, state)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers: the same everywhere, unrelated for different parts."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _save(
    path: Path,
    module: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: LoopConfig,
    state: Progress,
) -> None:
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    numbers: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for key, value in slots.items():
            place = tensors if isinstance(value, Tensor) else numbers
            place[f"optimizer.{index}.{key}"] = value
    metadata = {
        "config": asdict(config),
        "progress": asdict(state),
        "optimizer": numbers,
        "scaler": scaler.state_dict(),
        "torch": torch.__version__,
    }
    write_tensors(path, tensors, metadata, beside=True)


def _restore(
    path: Path,
    module: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: LoopConfig,
) -> Progress:
    tensors, metadata = read_tensors(path)
    for name in ("seed", "ema_decay", "clip_norm", "amp", "log_every", "evaluate_every"):
        before, now = metadata["config"][name], getattr(config, name)
        if before != now:
            raise ValueError(f"{name} must stay {before!r} to resume {path}, got {now!r}")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        module.load_state_dict(part("module."))
        ema.load_state_dict(part("ema."))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit this module: {error}") from error
    slots: dict[int, dict[str, Any]] = {}
    for name, value in [*part("optimizer.").items(), *metadata["optimizer"].items()]:
        index, key = name.removeprefix("optimizer.").split(".", 1)
        slots.setdefault(int(index), {})[key] = value
    # Hyperparameters are the caller's, not the checkpoint's.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    if scaler.is_enabled():
        scaler.load_state_dict(metadata["scaler"])
    return Progress(**metadata["progress"])


@torch.no_grad()
def _update_ema(ema: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)
    for mean, buffer in zip(ema.buffers(), module.buffers(), strict=True):
        mean.copy_(buffer)


def _share(batch: Batch, rank: int, world: int) -> Batch:
    if world == 1:
        return batch
    size = next(len(value) for value in batch.values() if value.ndim)
    if size % world:
        raise ValueError(f"the batch must divide among {world} processes, got {size} samples")
    share = size // world
    mine = slice(rank * share, (rank + 1) * share)
    return {name: value[mine] if value.ndim else value for name, value in batch.items()}


def _average(module: nn.Module, value: Tensor, stop: bool, world: int) -> tuple[Tensor, bool]:
    """Average gradients and loss over processes in one message; if one must stop, all do."""
    trained = [p for p in module.parameters() if p.requires_grad]
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    extra = torch.stack([value, torch.full_like(value, float(stop))])
    message = torch.cat([grad.reshape(-1) for grad in grads] + [extra])
    dist.all_reduce(message)
    message /= world
    sizes = [grad.numel() for grad in grads] + [1, 1]
    *parts, value, stopping = message.split(sizes)
    for parameter, grad, mean in zip(trained, grads, parts, strict=True):
        parameter.grad = grad.copy_(mean.view_as(grad))
    return value[0], bool(stopping > 0)


def _autocast(device: torch.device, amp: str | None) -> contextlib.AbstractContextManager[Any]:
    if amp is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, amp))


def _fork_rng(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Leave the caller's random state as it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of acting on it, and put the handlers back."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending  # only the main thread may set handlers
        return

    def note(number: int, frame: object) -> None:
        pending.append(number)
        restore()

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        yield pending
    finally:
        restore()


def _bar(config: LoopConfig, state: Progress, progress: bool, rank: int) -> Any:
    from tqdm.auto import tqdm  # late: importing fastdiff must stay cheap

    hidden = not progress or rank != 0
    return tqdm(
        total=config.steps, initial=state.step, desc="training", unit="step", disable=hidden
    )
