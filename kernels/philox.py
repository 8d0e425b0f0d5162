"""Normals from Philox4x32-10 on the device: the operations that `fastdiff/ops/philox.py` defines.

Every bit agrees with the reference where the caller compiles with enable_fp_fusion=False, as all
kernels that draw noise do.
"""

import triton
import triton.language as tl


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
    # Each is a float32. They are local, since Triton has a global constant in the cache key of a
    # kernel, or not, by which kernel of the process was launched first.
    L0: tl.constexpr = 0.3333333134651184
    L1: tl.constexpr = -0.2500081956386566
    L2: tl.constexpr = 0.2000124305486679
    L3: tl.constexpr = -0.1662341058254242
    L4: tl.constexpr = 0.14201539754867554
    L5: tl.constexpr = -0.13159550726413727
    L6: tl.constexpr = 0.12762485444545746
    L7: tl.constexpr = -0.07636940479278564
    LN2_HIGH: tl.constexpr = 0.693145751953125
    LN2_LOW: tl.constexpr = 1.428606765330187e-06
    S0: tl.constexpr = 0.7853981852531433
    S1: tl.constexpr = -0.08074582368135452
    S2: tl.constexpr = 0.0024909931235015392
    S3: tl.constexpr = -3.659276262624189e-05
    C1: tl.constexpr = -0.3084251284599304
    C2: tl.constexpr = 0.015854284167289734
    C3: tl.constexpr = -0.00032586869201622903
    C4: tl.constexpr = 3.4940869682031916e-06
    v = (u + 1).to(tl.int32, bitcast=True)
    g = v.to(tl.float32)
    g = tl.where(v <= 0, g + 4294967296.0, g)
    b = (g.to(tl.int32, bitcast=True) + 0x004AFB0D) >> 23
    k = b - 127
    d = v - ((1 ^ (k >> 5)) << (k & 31))
    f = d.to(tl.float32) * ((254 - b) << 23).to(tl.float32, bitcast=True)
    h = ((((((L7 * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    f2 = f * f
    y = (f2 * f) * h - 0.5 * f2
    n = (32 - k).to(tl.float32)
    t = n * LN2_HIGH - (f + (y - n * LN2_LOW))
    r = tl.sqrt_rn(t + t)

    a = (w << 2).to(tl.int32, bitcast=True) >> 2
    q = (w + 0x20000000) >> 30
    x = a.to(tl.float32) * 1.862645149230957e-09
    x2 = x * x
    s = x * (((S3 * x2 + S2) * x2 + S1) * x2 + S0)
    c = (((C4 * x2 + C3) * x2 + C2) * x2 + C1) * x2 + 1.0
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
