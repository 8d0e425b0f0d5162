"""The times that a sampler visits: how each kind of schedule spaces them.

A grid is called as (schedule, steps, spacing, start, convention) with arguments that
`NoiseSchedule.times` has checked. It returns float64 [steps + 1], from the noisiest time to the
end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def given(schedule: Any, steps: int | None, values: Sequence[float]) -> np.ndarray:
    """Times that the caller gives, checked."""
    times = np.asarray(values, dtype=np.float64)
    low = schedule.last if schedule.clean is None else schedule.clean
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"spacing given as times needs at least two; got shape {times.shape}")
    if steps is not None and steps != len(times) - 1:
        raise ValueError(f"steps must be {len(times) - 1} for {len(times)} times; got {steps}")
    if not (np.isfinite(times).all() and (np.diff(times) < 0).all()):
        raise ValueError("spacing given as times must be finite and strictly decreasing")
    if times[0] > schedule.first or times[-1] < low:
        raise ValueError(
            f"spacing given as times must lie in [{low}, {schedule.first}]; "
            f"got {times[0]} .. {times[-1]}"
        )
    return times


def continuous(
    schedule: Any, steps: int, spacing: str, start: float | None, convention: str
) -> np.ndarray:
    """The grid of schedules in continuous time."""
    if convention != "aligned":
        schedule.with_convention(convention)
    if spacing in ("leading", "quadratic"):
        raise ValueError(f"spacing {spacing!r} is for beta schedules; got it for {schedule.name}")
    first = schedule.first if start is None else float(start)
    end = schedule.last if schedule.clean is None else schedule.clean
    if spacing == "trailing":
        return np.linspace(first, end, steps + 1)
    return with_end(schedule, first, spacing, steps)


def with_end(schedule: Any, first: float, spacing: str, steps: int) -> np.ndarray:
    """Nodes spaced between `first` and `last`, then the clean time where there is one."""
    count = steps if schedule.clean is not None else steps + 1
    last = min(schedule.last, first)
    if spacing == "linspace":
        nodes = np.linspace(first, last, count)
    else:
        high, low = schedule.logsnr(first), schedule.logsnr(last)
        if spacing == "logsnr":
            logsnr = np.linspace(high, low, count)
        else:  # Karras et al. 2022, eq. 5, with rho = 7: uniform in (sigma / alpha)^(1/7)
            roots = np.linspace(math.exp(-high / 14), math.exp(-low / 14), count)
            logsnr = -14 * np.log(roots)
        nodes = np.asarray(schedule.time(logsnr))
        nodes[0] = first  # the inverse rounds; the ends are known
        if count > 1:
            nodes[-1] = last
    return nodes if schedule.clean is None else np.append(nodes, schedule.clean)


def whole(
    schedule: Any, steps: int, spacing: str, start: float | None, convention: str
) -> np.ndarray:
    """The grid of beta schedules: whole times, for most spacings."""
    first = schedule.first if start is None else float(start)
    span = int(first) + 1  # times 0 .. span - 1, and -1
    if steps > span:
        raise ValueError(
            f"steps must be at most {span}, the number of times from {first:g} "
            f"down to 0; got {steps}"
        )
    if convention != "aligned" and spacing != "leading":
        raise ValueError(f'convention {convention!r} goes with spacing "leading"; got {spacing!r}')
    stride = span // steps
    if convention == "published":
        if start is not None:
            raise ValueError('start does not go with convention "published"')
        nodes = np.arange(0, span, stride)[::-1]
        if nodes[0] + 2 >= len(schedule.log_bar):
            raise ValueError(
                f"steps = {steps} puts the published grid on time {nodes[0]}, whose alpha-bar "
                f"the published index (one too high) does not have; take another number of "
                f'steps or convention "aligned"'
            )
        return np.append(nodes, -1).astype(np.float64)
    if spacing == "leading":
        offset = 1 if convention == "offset" else 0
        nodes = np.arange(steps)[::-1] * stride + offset
        if start is not None:  # the rest of such a grid, where start is one of its nodes
            nodes = np.append(first, np.round(np.linspace(first, offset, steps))[1:])
        if nodes[0] > schedule.first:
            raise ValueError(
                f'steps = {steps} puts convention "offset" on time {nodes[0]}, past the last '
                f"one, {schedule.first:g}"
            )
        return np.append(nodes, offset - 1).astype(np.float64)
    if spacing == "trailing":
        nodes = np.round(np.arange(steps)[::-1] * (span / steps)) - 1
        return np.append(first, nodes)
    if spacing == "quadratic":  # Song et al. 2021 (DDIM), appendix D.2
        top = math.floor(0.8 * span) if start is None else first
        nodes = np.floor(np.linspace(math.sqrt(top), 0, steps)[1:] ** 2 + 1e-9)
        return np.concatenate([[top], nodes, [-1.0]])
    return with_end(schedule, first, spacing, steps)


def shifted(
    schedule: Any, steps: int, spacing: str, start: float | None, convention: str
) -> np.ndarray:
    """The grid of a flow: spaced in unshifted time, then shifted."""
    if spacing not in ("trailing", "linspace"):
        return continuous(schedule, steps, spacing, start, convention)
    # Start is a shifted time: unshift it, space, shift.
    first = schedule.first if start is None else float(start)
    unshifted = first / (schedule.shift - (schedule.shift - 1) * first)
    t = continuous(schedule, steps, spacing, unshifted, convention)
    times = schedule.shift * t / (1 + (schedule.shift - 1) * t)
    times[0] = first  # to the last bit
    return times
