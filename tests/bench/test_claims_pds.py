"""PDS's claims: the committed numbers, their page, and the closed forms behind them."""

import math

import numpy as np
import pytest

from bench.claims import pds as claims
from bench.claims.pds_page import page
from fastdiff.preconditioning import Preconditioner, power_law_masks


@pytest.fixture(scope="module")
def committed():
    return claims.committed()[0]


def test_the_page_shows_the_committed_numbers():
    assert claims.PAGE.read_text() == page(*claims.committed())


def test_what_the_page_says_of_the_learned_score():
    learned = claims.committed()[1]
    rows = {(row["alpha"], row["steps"]): row for row in learned["rows"]}
    steps = sorted({steps for _, steps in rows})
    assert steps == [50, 66, 100, 200] and len(rows) == 3 * len(steps) and learned["images"] == 128
    for t in steps:
        plain, five, auto = (rows[alpha, t] for alpha in claims.ALPHAS)
        assert five["spectrum"] > max(plain["spectrum"], auto["spectrum"])
        for other in (five, auto):  # the intervals overlap
            assert other["interval"][0] < plain["interval"][1]
            assert plain["interval"][0] < other["interval"][1]
    assert rows["5", 66]["distance"] <= rows["plain", 100]["distance"]
    for alpha in claims.ALPHAS:
        assert rows[alpha, 50]["distance"] > max(rows[alpha, t]["distance"] for t in (100, 200))


@pytest.mark.parametrize("alpha", claims.ALPHAS)
def test_rows_can_be_made_again(committed, alpha):
    """Also over every mode by itself, with the preconditioner's own gains."""
    size, setting, steps = 64, "FFHQ", 66
    sigma_max, snr = claims.SETTINGS[setting]
    law = claims.field(size)
    found = claims.error_of(law, alpha, sigma_max, snr)(steps)
    (row,) = (r for r in committed["sampler"]
              if (r["size"], r["setting"], r["alpha"]) == (size, setting, alpha))  # fmt: skip
    assert found == pytest.approx(row["errors"][str(steps)], rel=1e-6)

    statistics = power_law_masks(1, size, size)
    given = {"plain": math.inf, "5": 5.0, "auto": "auto"}[alpha]
    made = Preconditioner.from_statistics(
        statistics, alpha=given, steps=steps, sigma_min=claims.SIGMA_MIN, sigma_max=sigma_max
    )
    gains = np.ones((size, size)) if made.is_identity else made.frequency[0].numpy()
    power = np.expm1(statistics.log_power[0].numpy()) / size**2
    inside = np.arange(size * size) > 0
    power, gains = power.ravel()[inside], gains.ravel()[inside]
    whole = claims.Field(power, power, np.full(power.shape, 1 / power.size), np.empty(0))
    u = claims.sampled_variances(whole, gains, steps, sigma_max, snr)
    radius = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(size)], indexing="ij")).ravel()[inside]
    edges = claims.band_edges(size)
    bands = [(radius >= low) & (radius < high) for low, high in zip(edges, edges[1:], strict=False)]
    ratios = [(u[band] / power[band]).mean() for band in bands if band.any()]
    assert np.sqrt(np.mean(np.log(ratios) ** 2)) == pytest.approx(found, rel=0.05)


def test_what_a_mode_adds_to_the_acceptance():
    """The variance of its log, by drawing; and chains that were run accept as they should."""
    random, q = np.random.default_rng(0), 0.3
    x, z = random.standard_normal((2, 400_000))
    y = (1 - q) * x + math.sqrt(2 * q) * z
    back, forth = x - (1 - q) * y, y - (1 - q) * x
    change = -(y**2 - x**2) / 2 - (back**2 - forth**2) / (4 * q)
    assert change.mean() == pytest.approx(-(q**3) / 4, abs=2e-3)
    assert change.var() == pytest.approx(q**3 / 2 + q**6 / 8, rel=0.02)


def test_committed_chains_accept_as_they_should(committed):
    measured = [row["acceptance"] for row in committed["langevin"] if "acceptance" in row]
    assert len(measured) == 3 * len(claims.MALA_SIZES)
    for found in measured:
        assert found == pytest.approx(claims.ACCEPTANCE, abs=0.03)


def test_the_least_steps_keep_their_error():
    errors = {10: 0.01, 20: 0.06, 30: 0.04, 40: 0.05, 50: 0.03}
    assert claims.least_steps(errors, 0.05) == 30
    assert claims.least_steps(errors, 0.02) is None
    assert claims.least_steps(errors, 0.1) == 10
