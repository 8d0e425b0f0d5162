"""How good a folder of images is: the Frechet distance to a reference, with its interval.

One recipe, written out with every number: which images, how floats became bytes, what was done to
their size (nothing), the feature space, how many of each. Two numbers compare only where all of
that is equal, and then only by their intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import fastdiff
from fastdiff.app.distances import (
    DRAWS,
    GROUPS,
    Moments,
    frechet_distance,
    frechet_estimate,
    frechet_jackknife,
    moments,
)
from fastdiff.app.machine import cpu_model
from fastdiff.files import write_whole
from fastdiff.images import (
    RECIPE,
    ROUNDING,
    dims,
    from_bytes,
    image_files,
    read_images,
    to_bytes,
)
from fastdiff.models import load_digits_features
from fastdiff.training.recipes.digits import digits_split

DIGITS = "digits"  # as a reference: the 360 scans that the digits model was not trained on
CLAIM = 5000  # images that a claim needs
WIDE = 64  # features from which on the jackknife stands for the bootstrap
READ = 100  # images read at a time

FEATURES = ("digits", "pixels", "inception")


@dataclass(frozen=True)
class FeatureSpace:
    """A space in which sets of images are compared.

    name: one of `FEATURES`.
    what: one sentence for the report.
    extract: uint8 images [N, C, H, W] to features [N, D].
    """

    name: str
    what: str
    extract: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """What is kept of a set of images: the moments of its features, and how they were made.

    features: the feature space's name; count: images; shape: (C, H, W) of each.
    mean [D], covariance [D, D]: float64.
    recipe: what is known of where the images come from.
    """

    features: str
    count: int
    shape: tuple[int, ...]
    mean: Tensor
    covariance: Tensor
    recipe: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all."""

        def write(part: Path) -> None:
            with part.open("wb") as file:
                np.savez(
                    file,
                    mean=self.mean.numpy(),
                    covariance=self.covariance.numpy(),
                    count=self.count,
                    shape=self.shape,
                    features=self.features,
                    recipe=json.dumps(self.recipe),
                )

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote. Raises ValueError for anything else, and for numbers that cannot
        be moments."""
        try:
            with np.load(path, allow_pickle=False) as file:
                held = dict(file)
            statistics = cls(
                str(held["features"]),
                int(held["count"]),
                tuple(int(n) for n in held["shape"]),
                torch.from_numpy(held["mean"]).double(),
                torch.from_numpy(held["covariance"]).double(),
                json.loads(str(held["recipe"])),
            )
        except FileNotFoundError:
            raise FileNotFoundError(f"reference must exist; {path} does not") from None
        except Exception as error:
            raise ValueError(
                f"reference must be a folder or statistics that `fastdiff eval --save-stats` "
                f"wrote; {path} is neither"
            ) from error
        mean, covariance = statistics.mean, statistics.covariance
        size = len(mean) if mean.ndim == 1 else 0
        if not size or covariance.shape != (size, size) or statistics.count < 2:
            raise ValueError(
                f"reference must hold mean [D], covariance [D, D] and count >= 2; {path} holds "
                f"{tuple(mean.shape)}, {tuple(covariance.shape)} and {statistics.count}"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"reference must hold finite numbers; {path} holds NaN or infinity")
        return statistics


@dataclass(frozen=True)
class _Set:
    """A set of images by its features [N, D]."""

    source: str
    shape: tuple[int, ...]
    values: Tensor
    recipe: dict[str, Any]

    def statistics(self, features: str) -> Statistics:
        mean, covariance = moments(self.values)
        return Statistics(features, len(self.values), self.shape, mean, covariance, self.recipe)


def evaluate(
    images: Path,
    reference: str | None = None,
    *,
    features: str | None = None,
    save_stats: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a folder of images against a reference; the report, as JSON knows it.

    images: a folder of 8-bit grey or RGB images of one shape; a folder that `generate` wrote is
        checked to be complete.
    reference: a folder, statistics of one (.npz), or "digits" for the 360 held-out scans; None only
        saves statistics.
    features: "digits" (8x8 grey images), "pixels" (any) or "inception" (with torch-fidelity and
        its weights); the reference's own when None, "pixels" for a folder.
    save_stats: where to write the statistics of `images`.
    progress: show bars.

    Raises ValueError or OSError naming the argument.
    """
    features, known = resolve(reference, features, save_stats)
    ours, space = _folder(images, "images", features, progress)
    if save_stats is not None:
        ours.statistics(features).save(save_stats)
    report = {
        "images": _described(ours.source, len(ours.values), ours.shape, ours.recipe),
        "features": {"name": features, "dimensions": ours.values.shape[1], "what": space.what},
        "reading": "8-bit files as they are: no resizing, no cropping, no change of colour",
        "statistics": None if save_stats is None else str(save_stats),
    }
    if reference is not None:
        report |= _compare(ours, reference, known, space, progress)
    return report | {
        "machine": cpu_model(),
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
    }


def resolve(
    reference: str | None, features: str | None, save_stats: Path | None
) -> tuple[str, Statistics | None]:
    """The feature space that arguments of `evaluate` ask for, and the statistics of the reference
    if it is a file.

    Raises ValueError or FileNotFoundError where they do not fit together, before anything is read.
    """
    if reference is None and save_stats is None:
        raise ValueError("reference must be a folder or statistics, unless save_stats is given")
    if features not in (None, *FEATURES):
        raise ValueError(f"features must be one of {', '.join(FEATURES)}; got {features!r}")
    if reference is None or reference == DIGITS or Path(reference).is_dir():
        return features or ("digits" if reference == DIGITS else "pixels"), None
    known = Statistics.load(Path(reference))
    if features not in (None, known.features):
        raise ValueError(
            f"features must be {known.features!r}, those of {reference}; got {features!r}"
        )
    return known.features, known


def summary(report: dict[str, Any]) -> str:
    """The report for the terminal."""
    images, features = report["images"], report["features"]
    lines = [
        ("images", f"{images['count']:,} of {dims(images['shape'])} from {images['source']}"),
        ("reading", report["reading"]),
        ("features", f"{features['name']}, {features['dimensions']}: {features['what']}"),
    ]
    if images["recipe"]:
        made = images["recipe"]
        text = f"{made['model']['name']}, {made['solver']}, {made['calls']} calls"
        lines += [("made by", text), ("rounding", made["rounding"])]
    if report["statistics"]:
        lines.append(("statistics", f"written to {report['statistics']}"))
    if "frechet" in report:
        reference = report["reference"]
        lines += [
            (
                "reference",
                f"{reference['count']:,} of {dims(reference['shape'])} from {reference['source']}",
            ),
            ("estimator", report["estimator"]),
            ("Frechet", _interval(report["frechet"])),
            ("with bias", f"{report['frechet_with_bias']:.4g}, as is usually published"),
        ]
        if report["floor"]:
            text = f"{_interval(report['floor'])}, one half of the reference against the other"
            lines.append(("floor", text))
        lines += [("note", note) for note in report["notes"]]
    return "\n".join(f"{topic:>12}  {text}" for topic, text in lines)


# == Comparing =====================================================================================


def _compare(
    ours: _Set, reference: str, known: Statistics | None, space: FeatureSpace, progress: bool
) -> dict[str, Any]:
    floor = None
    if known is None:
        if reference == DIGITS:
            theirs = _held_out_digits(space)
        else:
            theirs, _ = _folder(Path(reference), "reference", space.name, progress)
        known = theirs.statistics(space.name)
        floor = _floor(theirs.values)
    if known.shape != ours.shape:
        raise ValueError(
            f"images and reference must have one shape; got {dims(ours.shape)} and "
            f"{dims(known.shape)}"
        )
    if known.mean.shape != ours.values.shape[1:]:
        raise ValueError(
            f"reference must have {ours.values.shape[1]} features; {reference} has "
            f"{len(known.mean)}"
        )
    theirs_moments = known.mean, known.covariance
    interval = f"basic bootstrap of the images, {DRAWS} draws"
    if ours.values.shape[1] > WIDE:
        interval = f"jackknife of the images, {GROUPS} groups"
    notes = []
    if len(ours.values) < CLAIM:
        notes.append(f"fewer than {CLAIM:,} images: enough for a look, not for a claim")
    if min(len(ours.values), known.count) <= ours.values.shape[1]:
        notes.append(
            "no more images than features: the covariance is singular, the distance is mostly bias"
        )
    return {
        "reference": _described(reference, known.count, known.shape, known.recipe),
        "estimator": f"squared Frechet distance, bias of the number of images taken off; 95 % "
        f"interval: {interval}, seed 0, reference fixed",
        "frechet": _estimate(ours.values, theirs_moments),
        "frechet_with_bias": round(frechet_distance(ours.values, theirs_moments), 6) + 0.0,
        "floor": floor,
        "notes": notes,
    }


def _estimate(values: Tensor, reference: Moments) -> list[float]:
    method = frechet_jackknife if values.shape[1] > WIDE else frechet_estimate
    return method(values, reference).to_list()


def _floor(values: Tensor) -> list[float] | None:
    """One half of the reference against the other: differences below this are nobody's fault."""
    least = 2 * 3 * GROUPS if values.shape[1] > WIDE else 4
    if len(values) < least:
        return None
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    one, other = values[order].tensor_split(2)
    return _estimate(one, moments(other))


def _described(source: str, count: int, shape: Sequence[int], recipe: Any) -> dict[str, Any]:
    return {"source": source, "count": count, "shape": list(shape), "recipe": recipe or None}


# == Sets of images ================================================================================


def _folder(
    folder: Path, argument: str, features: str, progress: bool
) -> tuple[_Set, FeatureSpace]:
    from tqdm.auto import tqdm  # late: importing fastdiff must stay cheap

    files = image_files(folder, argument)
    if len(files) < 2:
        raise ValueError(f"{argument} must hold at least 2 images; {folder} holds {len(files)}")
    recipe: dict[str, Any] = {}
    if (folder / RECIPE).is_file():
        recipe = json.loads((folder / RECIPE).read_text())
        if recipe.get("num_images") != len(files):
            raise ValueError(
                f"{argument} must be complete; {folder} holds {len(files)} of "
                f"{recipe.get('num_images')} images (run the same `fastdiff sample` again)"
            )
    shape = tuple(read_images(files[:1], None, argument).shape[1:])
    space = feature_space(features, shape, argument)
    parts = []
    with tqdm(total=len(files), desc=argument, unit="image", disable=not progress) as bar:
        for begin in range(0, len(files), READ):
            images = read_images(files[begin : begin + READ], shape, argument)
            parts.append(space.extract(images))
            bar.update(len(images))
    return _Set(str(folder), shape, torch.cat(parts), recipe), space


def _held_out_digits(space: FeatureSpace) -> _Set:
    _, (held, _) = digits_split()
    recipe = {
        "data": "scikit-learn's digits, the 360 scans held out from training",
        "rounding": ROUNDING,
    }
    return _Set(DIGITS, tuple(held.shape[1:]), space.extract(to_bytes(held)), recipe)


# == Feature spaces ================================================================================


def feature_space(name: str, shape: Sequence[int], argument: str) -> FeatureSpace:
    """The feature space of a name, for images (C, H, W) that errors call `argument`.

    Raises ValueError where it does not fit them, ImportError or FileNotFoundError where it is not
    installed.
    """
    if name == "digits":
        if tuple(shape) != (1, 8, 8):
            raise ValueError(f"{argument} must be 1x8x8 for features 'digits'; got {dims(shape)}")
        classifier = load_digits_features()
        return FeatureSpace(
            name,
            "last hidden layer of the committed classifier of 8x8 digits",
            lambda images: classifier.features(from_bytes(images).float()).double(),
        )
    if name == "pixels":
        if min(shape[1:]) < 8:
            raise ValueError(
                f"{argument} must be at least 8x8 for features 'pixels'; got {dims(shape)}"
            )
        return FeatureSpace(
            name,
            "lowest cosine coefficients (16 of brightness, 4 of each colour difference) of the "
            "image averaged to 8x8, and the strength of detail at two scales",
            pixel_features,
        )
    return _inception(name)


def pixel_features(images: Tensor) -> Tensor:
    """Layout, colour and the amount of detail, by a fixed linear map and four norms.

    images: uint8 [N, 1 or 3, H, W], H and W >= 8. Returns float64 [N, 20] (grey) or [N, 28] (RGB):
    of the image averaged to 8x8, the 4x4 lowest coefficients of the orthonormal cosine transform
    (DCT-II) of brightness and the 2x2 lowest of both colour differences; then the root mean square
    differences between neighbours, vertical and horizontal, of the brightness and of its half-size
    average, times 8, which is the scale of the coefficients. It sees what averages see: not whether
    a picture makes sense.
    """
    x = from_bytes(images)
    if x.shape[1] == 3:  # orthonormal: brightness, red against blue, both against green
        mix = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]).double()
        x = torch.einsum("oc,nchw->nohw", F.normalize(mix), x)
    k = torch.arange(8).double()
    cosine = 0.5 * torch.cos(math.pi / 8 * k[:, None] * (k + 0.5))
    cosine[0] /= math.sqrt(2)
    waves = cosine @ F.adaptive_avg_pool2d(x, 8) @ cosine.T
    parts = [waves[:, 0, :4, :4].flatten(1), waves[:, 1:, :2, :2].flatten(1)]
    for detail in (x[:, 0], F.avg_pool2d(x[:, :1], 2)[:, 0]):
        for axis in (1, 2):
            norm = detail.diff(dim=axis).square().mean((1, 2)).sqrt()
            parts.append(8 * norm[:, None])
    return torch.cat(parts, dim=1)


def _inception(name: str) -> FeatureSpace:
    """The FID's features, by torch-fidelity and from the weights it has fetched before."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as package
    except (ImportError, RuntimeError) as error:  # torchvision fails so beside another torch
        raise ImportError(
            f"features 'inception' need the packages torch-fidelity and torchvision; {error}"
        ) from error
    weights = Path(torch.hub.get_dir()) / "checkpoints" / package.URL_INCEPTION_V3.split("/")[-1]
    if not weights.is_file():
        raise FileNotFoundError(
            f"features 'inception' need torch-fidelity's weights, {package.URL_INCEPTION_V3}, at "
            f"{weights}; fastdiff downloads nothing"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = package.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    ).to(device)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1).to(device)
        return network(colour)[0].double().cpu()

    return FeatureSpace(
        name,
        "Inception-v3 pool features (those of the FID) by torch-fidelity, which resizes to "
        "299x299 as TensorFlow 1 did",
        extract,
    )


def _interval(estimate: Sequence[float]) -> str:
    value, low, high = (f"{number:.4g}" for number in estimate)
    return f"{value}  ({low} .. {high})"
