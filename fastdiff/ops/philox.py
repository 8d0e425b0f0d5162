"""Noise that depends on an image's seed alone: Philox4x32-10 and float32 normals, to the last bit.

This file is the definition. The C++ and Triton kernels repeat it operation by operation, and agree
on every bit because only integer operations, bit casts, int32 -> float32 conversions, float32
``+ - *`` (each rounded once: no fused multiply-add) and one correctly rounded square root occur. No
library log, sin or cos, whose last bit differs from place to place.

**Which words.** An image has a 64-bit seed; its element ``e`` is the logical row-major (C, H, W)
index, also when memory is channels_last. Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) with

    counter = (low32(e // 4), high32(e // 4), stage, purpose),    key = (low32(seed), high32(seed))

gives four words u0..u3, the noise of the elements 4 (e // 4) + 0..3: (u0, u1) serve lanes 0 and 1,
(u2, u3) lanes 2 and 3. ``purpose`` is 0 for noise inside a solver stage, 1 for initial noise, 2 and
3 for that of Haar bands, 4 for noise born in Fourier space: constants.py names them.

One Philox round, all words modulo 2^32, `hi` and `lo` the halves of a 32 x 32 -> 64 bit product:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

with M0 = 0xD2511F53, M1 = 0xCD9E8D57; before each of the rounds 2..10 the key grows:
k0 += 0x9E3779B9, k1 += 0xBB67AE85.

**Normals** (Box and Muller, 1958): a pair of words (u, w) gives  sqrt(-2 ln U) * (cos A, sin A)
with  U = (u + 1) / 2^32 in (0, 1]  and  A = 2 pi w / 2^32. In the steps below integers have 32 bits
(wrapping; >> is arithmetic on signed ones), `f32(int)` rounds to nearest even, and every float
operation is one float32 operation, in the order written.

Radius. U = 2^(k-32) (1 + f) with 1 + f in [0.707, 1.415]; v - 2^k is taken in integers, so that
both tails are accurate:

    v  = u + 1                                      uint32; 0 stands for 2^32
    g  = f32(signed(v));  if signed(v) <= 0: g = g + 4294967296.0
    b  = (bits(g) + 0x004AFB0D) >> 23               k + 127, where 2^k is the power of two nearest v
    k  = b - 127                                    0..32
    d  = signed(v - ((1 ^ (k >> 5)) << (k & 31)))   v - 2^k modulo 2^32 (k = 32: subtract 0)
    f  = f32(d) * float(bits = (254 - b) << 23)     exact scaling by 2^-k
    h  = L7;  for c in L6 ... L0:  h = h * f + c
    f2 = f * f
    y  = (f2 * f) * h - 0.5 * f2                    log1p(f) - f
    n  = f32(32 - k)
    t  = n * LN2_HIGH - (f + (y - n * LN2_LOW))     -ln U >= 0
    r  = sqrt(t + t)                                correctly rounded

Angle. A is reduced to the nearest quarter turn in integers; x in [-1, 1) counts eighths of a turn
from there:

    a  = signed(w << 2) >> 2;   q = (w + 0x20000000) >> 30        (unsigned shift; q = 0..3)
    x  = f32(a) * 2^-29;        x2 = x * x
    s  = x * (((S3 * x2 + S2) * x2 + S1) * x2 + S0)               sin(pi x / 4)
    c  = (((C4 * x2 + C3) * x2 + C2) * x2 + C1) * x2 + 1.0        cos(pi x / 4)
    if q & 1: swap(c, s)
    flip the sign bit of c if q is 1 or 2, that of s if q is 2 or 3
    lanes: r * c, r * s

Measured against float64 Box-Muller of the same words: |error| <= 3e-7 * max(1, |z|), root mean
square 5e-8; the largest radius is 6.66 (u = 0). The coefficients are our own weighted minimax fits,
rounded to float32 one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

# Exact float32 values. log1p(f) = f - f^2/2 + f^3 (L0 + L1 f + ... + L7 f^7)
LOG_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.555554p-2",
        "-0x1.000226p-2",
        "0x1.99a01ep-3",
        "-0x1.54728cp-3",
        "0x1.22d8f8p-3",
        "-0x1.0d81f2p-3",
        "0x1.05602ep-3",
        "-0x1.38cf20p-4",
    )
)
LN2_HIGH, LN2_LOW = (
    float.fromhex("0x1.62e400p-1"),
    float.fromhex("0x1.7f7d1cp-20"),
)  # n * LN2_HIGH is exact
SIN_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in ("0x1.921fb6p-1", "-0x1.4abc22p-4", "0x1.467fdcp-9", "-0x1.32f65cp-15")
)
COS_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in ("-0x1.3bd3ccp-2", "0x1.03c1b0p-6", "-0x1.55b2b6p-12", "0x1.d4f7eap-19")
)


def philox_words(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter and two key words: int64 tensors holding uint32, broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64; the mask after the arithmetic shift leaves the upper half
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def box_muller(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Two words (int64 tensors holding uint32) to two float32 normals, as defined above."""
    v = _signed(u + 1)
    g = v.float()
    g = torch.where(v <= 0, g + 4294967296.0, g)
    b = (g.view(torch.int32).long() + 0x004AFB0D) >> 23
    k = b - 127
    d = _signed(v - ((1 ^ (k >> 5)) << (k & 31)))
    f = d.float() * ((254 - b) << 23).int().view(torch.float32)
    h = _horner(LOG_COEFFICIENTS, f)
    f2 = f * f
    y = (f2 * f) * h - 0.5 * f2
    n = (32 - k).float()
    t = n * LN2_HIGH - (f + (y - n * LN2_LOW))
    r = (
        (t + t).double().sqrt().float()
    )  # rounding a float64 root once more is the correctly rounded float32 root

    a = _signed(w << 2) >> 2
    q = (w + 0x20000000 & _WORD) >> 30
    x = a.float() * 2.0**-29
    x2 = x * x
    s = x * _horner(SIN_COEFFICIENTS, x2)
    c = _horner(COS_COEFFICIENTS, x2) * x2 + 1.0
    swap = (q & 1).bool()
    c, s = torch.where(swap, s, c), torch.where(swap, c, s)
    return r * _flip(c, (q ^ (q >> 1)) & 1), r * _flip(s, q >> 1)


def philox_normal_ref(seeds: Tensor, elements: int, stage: int, purpose: int) -> Tensor:
    """Standard normals of whole images, in logical element order.

    seeds: [B] int64, one per image; elements: values per image; stage, purpose: 32-bit counter
    words. Returns [B, elements] float32 on the seeds' device.
    """
    block = torch.arange((elements + 3) // 4, device=seeds.device)
    key = (seeds[:, None] & _WORD, seeds[:, None] >> 32 & _WORD)
    words = philox_words(
        (
            block & _WORD,
            block >> 32,
            torch.full_like(block, stage & _WORD),
            torch.full_like(block, purpose & _WORD),
        ),
        key,
    )
    lanes = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return torch.stack(lanes, dim=-1).flatten(1)[:, :elements]


def _signed(word: Tensor) -> Tensor:
    """The low 32 bits of int64 values, read as two's complement."""
    return (word + 0x80000000 & _WORD) - 0x80000000


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _flip(x: Tensor, sign: Tensor) -> Tensor:
    """x with its sign bit flipped where sign is 1."""
    return (x.view(torch.int32) ^ (sign << 31).int()).view(torch.float32)
