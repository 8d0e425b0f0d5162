"""Haar pyramids: split and merge of all levels in one launch, and steps that never store one.

One level takes each 2 x 2 block a b / c d of each channel to four bands, and back, orthonormally:

    low = (a + b + c + d) / 2    V = (a + b - c - d) / 2    H = (a - b + c - d) / 2
    D = (a - b - c + d) / 2                                 a = (low + V + H + D) / 2,  ...

and goes on with the low band. V is top minus bottom, H left minus right. An odd side is padded by a
zero at its end, at each level, and cut off by the merge: reconstruction is perfect for every size,
and split and merge(size) are each other's adjoint. In "Non-uniform diffusion models" (Batzolis et
al. 2022) a pyramid's bands diffuse at their own rates; `haar_step`, `haar_expand`, `haar_noise` and
`haar_loss` take that in one launch each, without storing a pyramid.

Arithmetic is float32, float64 for float64 images: half-precision images are rounded once, at the
end. Every operation is rounded by itself, in this order:

    left = a + c;  right = b + d;  left' = a - c;  right' = b - d
    low, H = (left +- right) / 2;  V, D = (left' +- right') / 2

Noise is counted through a sample's pyramid in logical order, details finest first ([3, C, h, w]
each), then the coarse image: Philox (ops/philox.py) with purpose 2, that of an expansion with 3.

Backends: C++ for CPU tensors (csrc/cpu), CUDA C++ for CUDA tensors (csrc/cuda) where the extension
was built with them, and plain PyTorch elsewhere. Split, merge and steps agree bit for bit.
"""

from .public import haar_expand, haar_loss, haar_merge, haar_noise, haar_split, haar_step
from .pyramid import HaarPyramid
from .reference import (
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_normal_ref,
    haar_split_ref,
    haar_step_ref,
)

__all__ = [
    "HaarPyramid",
    "haar_expand",
    "haar_expand_ref",
    "haar_loss",
    "haar_loss_ref",
    "haar_merge",
    "haar_merge_ref",
    "haar_noise",
    "haar_normal_ref",
    "haar_split",
    "haar_split_ref",
    "haar_step",
    "haar_step_ref",
]
