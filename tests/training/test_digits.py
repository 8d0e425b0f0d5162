"""The committed digits model: what was promised of it holds, and its numbers can be made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import fastdiff.models.digits
from fastdiff.app import digits_quality
from fastdiff.app.distances import frechet_distance, paired_error
from fastdiff.models import load_digits, load_digits_features, load_digits_reference
from fastdiff.ops import seeded_noise
from fastdiff.sampler import Sampler
from fastdiff.training.recipes import digits

pytest.importorskip("sklearn")
ASSETS = Path(fastdiff.models.digits.__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def quality() -> dict:
    return json.loads((ASSETS / "digits_quality.json").read_text())


def test_split_is_fixed_stratified_and_disjoint() -> None:
    (fit, fit_labels), (held, held_labels) = digits.digits_split()
    assert (len(fit), len(held)) == (1437, 360)
    assert torch.equal(held_labels.bincount(), torch.full((10,), 36))
    assert (fit.min(), fit.max()) == (-1, 1)
    assert fit.shape[1:] == held.shape[1:] == (1, 8, 8)
    digest = hashlib.sha256(held.numpy().tobytes() + held_labels.numpy().tobytes()).hexdigest()
    assert digest.startswith("e4faa795fe2f3d24")
    (_, _), (again, _) = digits.digits_split()
    assert torch.equal(held, again)


def test_noised_batch_by_hand() -> None:
    images, labels = torch.full((2, 1, 8, 8), 0.5), torch.tensor([1, 2])
    noise = torch.full((2, 1, 8, 8), 2.0)
    batch = digits.noised(images, labels, torch.tensor([-1.0, 0.0]), noise)
    assert torch.equal(batch["x"][0], images[0])  # time -1 is the clean image
    expected = (1 - 1e-4) ** 0.5 * 0.5 + 1e-2 * 2.0
    torch.testing.assert_close(batch["x"][1], torch.full((1, 8, 8), expected))


def test_batches_depend_on_the_step_alone_and_drop_labels() -> None:
    (fit, labels), _ = digits.digits_split()
    batches = digits.denoising_batches(fit, labels, 1000, null=0.15)
    one, two = (batches(0, torch.Generator().manual_seed(4)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert 0.10 < (one["labels"] == digits.CLASSES).double().mean() < 0.20
    assert -1 <= one["t"].min() < 0 and 998 < one["t"].max() <= 999


def test_committed_files_are_small_and_complete() -> None:
    assert (ASSETS / "digits.safetensors").stat().st_size <= 4e6
    metadata = json.loads((ASSETS / "digits.json").read_text())
    assert metadata == load_digits()[1]
    assert metadata["parameters"]["unet"] <= 1e6
    assert {"network", "recipe", "seed", "command", "torch", "best", "accuracy"} <= metadata.keys()


def test_committed_losses_and_accuracy_are_those_of_the_committed_weights() -> None:
    unet, metadata = load_digits()
    _, held = digits.digits_split()
    found = digits.held_out_denoising(*held, "held_out")(unet)["held_out"]
    assert found == pytest.approx(metadata["best"]["held_out"], rel=1e-4)
    assert found == pytest.approx(min(loss for _, loss, _ in metadata["held_out_curve"]), rel=1e-4)
    assert digits.accuracy(load_digits_features(), *held) == metadata["accuracy"] >= 0.95


def test_reference_is_the_converged_solution_of_its_seeds() -> None:
    """A second-order solver nears it: four times the steps, at least four times as close."""
    unet, _ = load_digits()
    reference = load_digits_reference()
    assert torch.equal(reference["noise"], seeded_noise(range(64), (64, 1, 8, 8)))
    some = {name: value[:4] for name, value in reference.items()}

    def error(steps: int) -> float:
        sampler = Sampler(
            unet.double(), digits.digits_schedule(), solver="heun", steps=steps, dtype=torch.float64
        )
        return paired_error(sampler(some["noise"], labels=some["labels"]), some["x0"]).value

    coarse, fine = error(25), error(100)
    assert fine < coarse / 4
    assert fine < 0.005


def test_committed_paired_errors_can_be_made_again(quality: dict) -> None:
    unet, _ = load_digits()
    reference = load_digits_reference()
    rows = {(row["solver"], row["calls"]): row for row in quality["rows"]}
    for name, calls in (("ipndm", 10), ("ddim", 10), ("f_pndm", 20)):
        row = rows[name, calls]
        sampler = Sampler(unet, digits.digits_schedule(), solver=name, steps=row["steps"])
        assert sampler.tableau.nfe == calls
        found = paired_error(
            sampler(reference["noise"], labels=reference["labels"]), reference["x0"]
        )
        assert found.to_list() == pytest.approx(row["paired"], rel=1e-3)


def test_committed_quality_says_what_it_must(quality: dict) -> None:
    assert quality["samples"] >= 5000
    wanted = {
        (name, calls) for name, numbers in digits_quality.SOLVERS.items() for calls in numbers
    }
    assert {(row["solver"], row["calls"]) for row in quality["rows"]} == wanted
    for row in quality["rows"]:
        for name in {"paired", "frechet"} & row.keys():
            value, low, high = row[name]
            assert low <= value <= high
        assert ("frechet" in row) == digits_quality.wants_frechet(row["solver"], row["calls"])
    low, high = quality["memorisation"]["chance_nearer_than_held_out"][1:]
    assert low < high < 0.75  # copies of training images would give 1
    _, held = digits.digits_split()
    fit, _ = digits.digits_split()
    features = load_digits_features()
    plain = frechet_distance(features.features(fit[0]), features.features(held[0]))
    floor, low, high = quality["floor"]["frechet"]
    assert low < floor < plain  # what is left once the bias of 1,437 images is off


def test_steps_for_calls() -> None:
    assert digits_quality.steps_for("ddim", 10) == 10
    assert digits_quality.steps_for("s_pndm", 10) == 9
    assert digits_quality.steps_for("heun", 9) == 5
    with pytest.raises(ValueError, match="heun"):
        digits_quality.steps_for("heun", 10)


def test_evaluation_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "quality.json"
    digits_quality.evaluate_digits(out, samples=40, solvers={"ddim": (5,)}, progress=False)
    first = json.loads(out.read_text())["rows"]
    sampled = []
    whole = digits_quality.sample_digits
    monkeypatch.setattr(
        digits_quality, "sample_digits", lambda s, n: sampled.append(s.tableau.nfe) or whole(s, n)
    )
    wanted = {"ddim": (5, 9)}
    report = digits_quality.evaluate_digits(out, samples=40, solvers=wanted, progress=False)
    assert sampled == [9]
    assert report["rows"][0] == first[0]
    assert [row["calls"] for row in json.loads(out.read_text())["rows"]] == [5, 9]


def test_training_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of the real recipe write a model of the committed form."""
    monkeypatch.setattr(digits, "BATCH", 8)
    monkeypatch.setattr(digits, "CLASSIFIER", digits.replace(digits.CLASSIFIER, steps=3))
    metadata = digits.train_digits(tmp_path, steps=3, progress=False)
    assert metadata.keys() == load_digits()[1].keys()
    assert (tmp_path / "digits.safetensors").stat().st_size == pytest.approx(
        (ASSETS / "digits.safetensors").stat().st_size, rel=0.01
    )
    again = digits.train_digits(tmp_path, steps=3, progress=False)  # resumes at the end
    assert again == metadata
