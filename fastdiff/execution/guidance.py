"""Classifier-free guidance of a run: the scale, and conditioning for the doubled batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def guidance_scale(
    scale: float | Tensor | None, uncond: dict[str, Any] | None, batch: int, like: Tensor
) -> Tensor | None:
    """The scale [1 or B] in the state's dtype and on its device; None without guidance.

    Raises ValueError for another shape, and for `uncond` without a scale.
    """
    if scale is None:
        if uncond is not None:
            raise ValueError("uncond must come with guidance_scale")
        return None
    scale = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if scale.ndim > 1 or (scale.ndim == 1 and len(scale) not in (1, batch)):
        raise ValueError(
            f"guidance_scale must be a number or a tensor [{batch}]; got shape {tuple(scale.shape)}"
        )
    return scale.reshape(-1).contiguous()


def doubled_conditioning(
    conditioning: dict[str, Any], uncond: dict[str, Any], batch: int
) -> dict[str, Any]:
    """Conditioning for the doubled batch, the unconditional half first."""
    return {
        name: _doubled(name, value, uncond.get(name, value), batch)
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
            raise ValueError(
                f"uncond[{name!r}] must be a dict with keys of {sorted(value)}; got {got}"
            )
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
