"""The numbers that Python, C++ and the Triton kernels share; csrc's are tested against these."""

from __future__ import annotations

READS = (1, 2, 4, 8, 16)  # how many slots a launch of `multistep_step` can read: its variants
WRITES = (1, 2, 3)  # and write
MAX_OPERANDS = 8  # of `weighted_sums`
MAX_SUMS = 3

# Purposes of noise: the last word of Philox's counter (philox.py).
STAGE_NOISE, INITIAL_NOISE, PYRAMID_NOISE, EXPANSION_NOISE, SPECTRAL_NOISE = range(5)

# Where the length of a move comes from: given, or found from norms of each sample or of the batch.
STEPS = ("given", "sample", "batch")

MAX_LEVELS = 5  # of a Haar pyramid
LARGEST_WHOLE = 64  # sides of an image that one program of a spectral kernel holds
