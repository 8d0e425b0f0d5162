"""A small UNet: the reference denoiser of this project.

The usual shape (Ho et al. 2020, Dhariwal & Nichol 2021): residual blocks with group normalisation
and SiLU, a time embedding that scales and shifts the normalised features, self-attention on the
coarsest level, skip connections by concatenation.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet`.

    channels: image channels, in and out.
    widths: features of each level, finest first; every further level halves the image.
    blocks: residual blocks per level, as many down as up; each hands its output across.
    heads: attention heads on the coarsest level; must divide its width.
    classes: number of class labels; 0 for an unconditional network. The null class is label
        `classes`.
    dropout: probability inside every residual block while training.
    groups: groups of every normalisation; must divide every width.
    periods: shortest and longest period of the time embedding, in units of t. The shortest one
        bounds how fast the network can change with t, and multistep solvers live on that
        smoothness.
    """

    channels: int = 3
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 2
    heads: int = 4
    classes: int = 0
    dropout: float = 0.0
    groups: int = 8
    periods: tuple[float, float] = (10.0, 10_000.0)

    def __post_init__(self) -> None:
        if not self.widths or any(width % self.groups for width in self.widths):
            raise ValueError(f"widths must be multiples of groups={self.groups}, got {self.widths}")
        if self.widths[-1] % self.heads:
            raise ValueError(
                f"heads must divide the last width {self.widths[-1]}, got {self.heads}"
            )

    @property
    def factor(self) -> int:
        """Image height and width must be multiples of this."""
        return 2 ** (len(self.widths) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> UNetConfig:
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples again)."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**known)


def time_embedding(t: Tensor, size: int, periods: tuple[float, float]) -> Tensor:
    """Sines and cosines of t at `size // 2` geometrically spaced periods.

    t: [B], any real values. Returns [B, size], float64: an angle of hundreds of radians rounded to
    float32 would cost four digits.
    """
    shortest, longest = periods
    spread = torch.linspace(0.0, 1.0, size // 2, dtype=torch.float64, device=t.device)
    rates = 2 * math.pi / shortest * (shortest / longest) ** spread
    angles = t.to(torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Start a branch at zero, so that every residual block begins as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + conv(drop(silu(modulate(norm(conv(silu(norm(x)))))))), modulated by the embedding."""

    def __init__(self, inputs: int, outputs: int, embedding: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(inputs, config.groups), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(config.groups, outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class SelfAttention(nn.Module):
    """x + attention between all positions of the image."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, breadth = x.shape
        heads = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, width // self.heads, -1)
        q, k, v = heads.transpose(-1, -2).unbind(1)  # each [B, heads, positions, width / heads]
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(h.reshape(batch, width, height, breadth))


class UNet(nn.Module):
    """Denoiser of images.

    forward(x, t, labels=None):
        x: [B, C, H, W], the dtype of the weights; H and W multiples of `config.factor`.
        t: [B] or scalar (tensor or number), any real dtype; times need not be whole.
        labels: [B] integers in 0..classes (`classes` is the null class); None is the null class for
        all. Returns [B, C, H, W], the network's prediction (epsilon, x0, ... as trained).
    Raises ValueError for a shape that does not fit and for labels given to an unconditional
    network.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, finest = config.widths, config.widths[0]
        embedding = 4 * finest
        self.time = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = nn.Embedding(config.classes + 1, embedding) if config.classes else None

        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedding, config)

        self.stem = nn.Conv2d(config.channels, finest, 3, padding=1)
        width = finest
        self.down = nn.ModuleList()
        for level, outputs in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            for _ in range(config.blocks):
                self.down.append(block(width, outputs))
                width = outputs
        self.middle = nn.ModuleList(
            [block(width, width), SelfAttention(width, config.heads, config.groups)]
        )
        self.up = nn.ModuleList()
        for level, outputs in reversed(list(enumerate(widths))):
            for _ in range(config.blocks):
                self.up.append(block(width + outputs, outputs))
                width = outputs
            if level:
                enlarge = nn.Conv2d(width, width, 3, padding=1)
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), enlarge))
        self.norm = nn.GroupNorm(config.groups, width)
        self.head = zero(nn.Conv2d(width, config.channels, 3, padding=1))

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> UNet:
        """Of its configuration as JSON knows it (`UNetConfig.to_dict`)."""
        return cls(UNetConfig.from_dict(settings))

    def embed(self, t: Tensor | float, labels: Tensor | None, x: Tensor) -> Tensor:
        """Time and class of each image, [B, 4 * widths[0]], ready to modulate (SiLU applied)."""
        t = torch.as_tensor(t, device=x.device)
        if t.shape not in ((), (len(x),)):
            raise ValueError(f"t must be a scalar or have shape ({len(x)},), got {tuple(t.shape)}")
        t = t.expand(len(x))
        sines = time_embedding(t, 4 * self.config.widths[0], self.config.periods)
        embedding = self.time(sines.to(x.dtype))
        if self.label is None:
            if labels is not None:
                raise ValueError("labels must be None: this network has no classes")
        else:
            if labels is None:
                labels = torch.full((len(x),), self.config.classes, device=x.device)
            elif labels.shape != (len(x),):
                raise ValueError(f"labels must have shape ({len(x)},), got {tuple(labels.shape)}")
            embedding = embedding + self.label(labels)
        return F.silu(embedding)

    def forward(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        channels, factor = self.config.channels, self.config.factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must have shape [B, {channels}, H, W] with H and W multiples of {factor}, "
                f"got {tuple(x.shape)}"
            )
        embedding = self.embed(t, labels, x)
        h = self.stem(x)
        across = []
        for layer in self.down:
            if isinstance(layer, ResidualBlock):
                h = layer(h, embedding)
                across.append(h)
            else:
                h = layer(h)
        h = self.middle[1](self.middle[0](h, embedding))
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = layer(torch.cat([h, across.pop()], dim=1), embedding)
            else:
                h = layer(h)
        return self.head(F.silu(self.norm(h)))
