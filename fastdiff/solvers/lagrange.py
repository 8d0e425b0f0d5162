"""Weights of multistep methods on any grid: integrals of Lagrange polynomials, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Nodes and weights of 64-point Gauss-Legendre quadrature on [-1, 1].
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def lagrange_means(
    nodes: Sequence[float],
    begin: float,
    end: float,
    position: Callable[[np.ndarray], np.ndarray] = lambda s: s,
) -> list[float]:
    """For each node the mean over [begin, end] of its Lagrange polynomial; the means sum to 1.

    The polynomials run through `nodes` in the variable position(s), the mean is over s. Exact for
    the identity (degree <= 127).
    """
    s = (begin + end) / 2 + (end - begin) / 2 * _POINTS
    where = position(s)
    means = []
    for j, node in enumerate(nodes):
        polynomial = np.ones_like(s)
        for k, other in enumerate(nodes):
            if k != j:
                polynomial *= (where - other) / (node - other)
        means.append(float(polynomial @ _WEIGHTS) / 2)
    return means
