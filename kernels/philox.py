"""Normals from Philox4x32-10 on the device: the operations that `fastdiff/ops/philox.py` defines.

Every bit agrees with the reference where the caller compiles with enable_fp_fusion=False, as all
kernels that draw noise do.
"""

import triton
import triton.language as tl

_L0 = tl.constexpr(float.fromhex("0x1.555554p-2"))
_L1 = tl.constexpr(float.fromhex("-0x1.000226p-2"))
_L2 = tl.constexpr(float.fromhex("0x1.99a01ep-3"))
_L3 = tl.constexpr(float.fromhex("-0x1.54728cp-3"))
_L4 = tl.constexpr(float.fromhex("0x1.22d8f8p-3"))
_L5 = tl.constexpr(float.fromhex("-0x1.0d81f2p-3"))
_L6 = tl.constexpr(float.fromhex("0x1.05602ep-3"))
_L7 = tl.constexpr(float.fromhex("-0x1.38cf20p-4"))
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e400p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_S0 = tl.constexpr(float.fromhex("0x1.921fb6p-1"))
_S1 = tl.constexpr(float.fromhex("-0x1.4abc22p-4"))
_S2 = tl.constexpr(float.fromhex("0x1.467fdcp-9"))
_S3 = tl.constexpr(float.fromhex("-0x1.32f65cp-15"))
_C1 = tl.constexpr(float.fromhex("-0x1.3bd3ccp-2"))
_C2 = tl.constexpr(float.fromhex("0x1.03c1b0p-6"))
_C3 = tl.constexpr(float.fromhex("-0x1.55b2b6p-12"))
_C4 = tl.constexpr(float.fromhex("0x1.d4f7eap-19"))


@triton.jit
def philox_words(seed, quad, stage, purpose):
    """Four words (uint32) for each quad int64 [N] = element // 4; the rest are scalars."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = quad.to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32)
    c2 = stage.to(tl.uint32)
    c3 = purpose.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(u, w):
    """Two words (uint32) to two normals (float32)."""
    v = (u + 1).to(tl.int32, bitcast=True)
    g = v.to(tl.float32)
    g = tl.where(v <= 0, g + 4294967296.0, g)
    b = (g.to(tl.int32, bitcast=True) + 0x004AFB0D) >> 23
    k = b - 127
    d = v - ((1 ^ (k >> 5)) << (k & 31))
    f = d.to(tl.float32) * ((254 - b) << 23).to(tl.float32, bitcast=True)
    h = ((((((_L7 * f + _L6) * f + _L5) * f + _L4) * f + _L3) * f + _L2) * f + _L1) * f + _L0
    f2 = f * f
    y = (f2 * f) * h - 0.5 * f2
    n = (32 - k).to(tl.float32)
    t = n * _LN2_HIGH - (f + (y - n * _LN2_LOW))
    r = tl.sqrt_rn(t + t)

    a = (w << 2).to(tl.int32, bitcast=True) >> 2
    q = (w + 0x20000000) >> 30
    x = a.to(tl.float32) * 1.862645149230957e-09
    x2 = x * x
    s = x * (((_S3 * x2 + _S2) * x2 + _S1) * x2 + _S0)
    c = (((_C4 * x2 + _C3) * x2 + _C2) * x2 + _C1) * x2 + 1.0
    swap = (q & 1) != 0
    cosine = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ ((q ^ (q >> 1)) << 31)
    sine = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ ((q >> 1) << 31)
    return r * cosine.to(tl.float32, bitcast=True), r * sine.to(tl.float32, bitcast=True)


@triton.jit
def normals_of_quads(seed, quad, stage, purpose):
    """Normals of whole quads in element order: quad int64 [N] = element // 4 -> float32 [4 N]."""
    u0, u1, u2, u3 = philox_words(seed, quad, stage, purpose)
    z0, z1 = box_muller(u0, u1)
    z2, z3 = box_muller(u2, u3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normals(seed, element, stage, purpose):
    """Normals of elements int64 [N] in any order -> float32 [N]; each costs a quad's words."""
    u0, u1, u2, u3 = philox_words(seed, element // 4, stage, purpose)
    lane = (element % 4).to(tl.int32)
    cosine, sine = box_muller(tl.where(lane < 2, u0, u2), tl.where(lane < 2, u1, u3))
    return tl.where(lane % 2 == 0, cosine, sine)
