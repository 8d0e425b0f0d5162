"""PNDM's claims: the committed numbers, their page, and the arithmetic of the verdicts."""

import math
from dataclasses import replace

import pytest
import torch

from bench.claims import pndm as claims
from bench.claims import problems
from bench.claims.common import Store, folded, unfolded
from bench.claims.pndm import FAILS, HOLDS, OPEN
from bench.claims.pndm_page import page
from fastdiff import NoiseSchedule
from tests.helpers.oracles import Gaussian

SHAKY = 1e-3  # relative; another machine's float32 network differs by less


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As the committed numbers were made; the tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def committed():
    return claims.read(claims.JSON)


# == Problems ======================================================================================


@pytest.mark.parametrize("mixture", [claims.MILD, claims.STIFF], ids=["mild", "stiff"])
@pytest.mark.parametrize("angle", [0.05, 0.8, 1.5])
def test_epsilon_is_the_gradient_of_the_density(mixture, angle):
    alpha, sigma = math.cos(angle), math.sin(angle)
    x = (alpha * torch.randn(20, 3, dtype=torch.float64)).requires_grad_()
    parts = torch.distributions.Independent(
        torch.distributions.Normal(
            alpha * torch.tensor(mixture.means, dtype=torch.float64),
            (alpha**2 * torch.tensor(mixture.stds, dtype=torch.float64) ** 2 + sigma**2).sqrt(),
        ),
        1,
    )
    weights = torch.distributions.Categorical(torch.tensor(mixture.weights, dtype=torch.float64))
    density = torch.distributions.MixtureSameFamily(weights, parts)
    score = torch.autograd.grad(density.log_prob(x).sum(), x)[0]
    found = mixture.epsilon(x.detach(), alpha, sigma)
    torch.testing.assert_close(found, -sigma * score, rtol=1e-9, atol=1e-10)
    whole = alpha * mixture.data(x.detach(), alpha, sigma) + sigma * found
    torch.testing.assert_close(whole, x.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [999.0, 700.0])
def test_the_converged_solution_of_one_gaussian_is_the_exact_one(start):
    gaussian, schedule = Gaussian(0.3, 0.05), NoiseSchedule.linear_beta()
    one = claims.Mixture("one", (1.0,), ((0.3, 0.3),), ((0.05, 0.05),), points=8)
    exact = gaussian.flow(one.noise, (schedule.alpha(start), schedule.sigma(start)), (1.0, 0.0))
    torch.testing.assert_close(one.converged(schedule, start), exact, rtol=0, atol=1e-8)


def test_moved_counts_samples_in_another_component():
    ends = torch.tensor(claims.STIFF.means, dtype=torch.float64)
    assert claims.STIFF.moved(ends, ends) == 0
    assert claims.STIFF.moved(ends[[1, 0, 2, 3]], ends) == 0.5


# == Verdicts ======================================================================================


def test_a_verdict_takes_more_than_two_standard_errors():
    verdicts = [claims.judged(d, 1.0)["verdict"] for d in (2.1, 2.0, 0.0, -2.0, -2.1)]
    assert verdicts == [HOLDS, OPEN, OPEN, OPEN, FAILS]


def test_a_claim_of_several_fails_with_one_of_them():
    assert claims.overall([HOLDS, HOLDS]) == HOLDS
    assert claims.overall([HOLDS, OPEN]) == OPEN
    assert claims.overall([OPEN, FAILS, HOLDS]) == FAILS


def test_comparisons_are_paired(tmp_path):
    """Errors that vary a thousandfold from point to point, one always 1 % above the other."""
    cell = claims.Cell(claims.QUICK, claims.MILD, "linear", "trailing", Store(tmp_path, ""))
    spread = torch.logspace(-6, -3, 50, dtype=torch.float64)
    cell.squares = {("ipndm", 1): spread, ("ddim", 1): 1.01 * spread}
    assert cell.against(("ipndm", 1), ("ddim", 1))["verdict"] == HOLDS
    assert cell.against(("ddim", 1), ("ipndm", 1))["verdict"] == FAILS
    cell.squares["ddim", 1] = spread.flip(0)
    assert cell.against(("ipndm", 1), ("ddim", 1))["verdict"] == OPEN


def test_frechet_differences_are_paired():
    generator = torch.Generator().manual_seed(0)
    reference = claims.moments(torch.randn(400, 4, generator=generator))
    samples = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    worse = samples + 0.05 * torch.tensor([1.0, 0, 0, 0]) * samples.mean(0).sign()
    # Two sets of 300 would leave this open: their distances vary by ten times as much.
    assert claims.frechet_difference(samples, worse, reference, 100)["verdict"] != OPEN
    same = claims.frechet_difference(samples, samples.flip(0), reference, 100)
    assert same["verdict"] == OPEN


def test_equal_calls_are_at_most_as_many():
    schedule = NoiseSchedule.linear_beta()
    for name in (*claims.MEMBERS, *claims.RIVALS):
        steps = claims.within(name, schedule, 21, "trailing")
        calls = claims.build_tableau(name, schedule, steps, spacing="trailing").nfe
        more = claims.build_tableau(name, schedule, steps + 1, spacing="trailing").nfe
        assert calls == 21 < more


# == The run and its page ==========================================================================


def test_a_quick_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    files = {"--json": tmp_path / "claims.json", "--work": tmp_path / "work"}
    arguments = [str(word) for pair in files.items() for word in pair]
    assert claims.main(["--quick", *arguments]) == 0
    report = claims.read(files["--json"])
    assert len(report["ddim_comparisons"]) == 2 * 4 * 2 * 4 and len(report["equal_calls"]) == 2
    assert {row["solver"] for row in report["rows"]} == set(claims.NAMES)
    assert len(report["frechet"]["rows"]) == 11

    monkeypatch.setattr(problems, "Sampler", None)  # everything measured is kept
    monkeypatch.setattr(claims, "sample_digits", None)
    monkeypatch.setattr(claims, "QUICK", replace(claims.QUICK, cells=claims.QUICK.cells[:1]))
    monkeypatch.setattr(claims, "frechet_report", lambda *given: {})
    assert claims.main(["--quick", *arguments]) == 0
    again = claims.read(files["--json"])
    assert again["rows"] == [r for r in report["rows"] if r["problem"] == claims.STIFF.name]

    claims.write(report, files["--json"])
    assert claims.main(["--page", *arguments, "--markdown", str(tmp_path / "p" / "page.md")]) == 0
    written = (tmp_path / "p" / "page.md").read_text()
    assert written == page(report) and FAILS in written


def test_folded_rows_come_back():
    rows = [{"a": 1, "b": 2, "c": [3]}, {"a": 2, "b": 1}, {"a": 1, "b": 3, "d": "x"}]
    assert unfolded(folded(rows, "a")) == [rows[0], rows[2], rows[1]]


def test_the_committed_page_is_that_of_the_committed_numbers(committed):
    assert claims.PAGE.read_text() == page(committed)


def test_the_committed_report_is_complete(committed):
    assert len(committed["ddim_comparisons"]) == len(claims.FULL.cells) * 4 * 2 * 4
    assert len(committed["equal_calls"]) == len(claims.FULL.cells) * len(claims.FULL.budgets)
    assert (tuple(committed["steps"]), tuple(committed["ddim"])) == ((20, 50), (50, 250, 1000))
    for row in committed["rows"]:
        value, low, high = row["distance"]
        assert 0 < low <= value <= high


@pytest.mark.parametrize(
    "problem, schedule, spacing, runs",
    [
        (claims.MILD, "linear", "trailing", [("ipndm", 50), ("s_pndm", 20), ("ddim", 50)]),
        (claims.STIFF, "scaled-linear", "leading", [("f_pndm", 20), ("ddim", 50)]),
        (claims.STIFF, "cosine", "trailing", [("plms", 20), ("ddim", 50)]),
        (claims.FULL.cells[6][0], "linear", "trailing", [("ipndm", 20), ("ddim", 20)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_committed_numbers_can_be_made_again(committed, tmp_path, problem, schedule, spacing, runs):
    cell = claims.Cell(claims.FULL, problem, schedule, spacing, Store(tmp_path, ""))
    for run in runs:
        cell.run(*run)
        row = cell.rows[run]
        (found,) = (
            r
            for r in committed["rows"]
            if all(r[k] == row[k] for k in (*cell.where, "solver", "steps"))
        )
        assert row["distance"] == pytest.approx(found["distance"], rel=SHAKY)
        assert (row["calls"], row["start"]) == (found["calls"], found["start"])
    ours, theirs = runs[0], runs[-1]
    for f in committed["ddim_comparisons"]:
        same_place = all(f[key] == value for key, value in cell.where.items())
        if same_place and (f["member"], f["steps"], f["ddim"]) == (*ours, theirs[1]):
            made = cell.against(ours, theirs)
            assert made["verdict"] == f["verdict"]
            assert made["difference"] == pytest.approx(f["difference"], rel=SHAKY)
            break
    else:
        pytest.fail("the report lacks the comparison")
