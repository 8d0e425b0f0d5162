"""Measuring folders of images: closed forms, what is written, and every way to ask wrongly."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.app.evaluate import Statistics, evaluate, feature_space, pixel_features, summary
from fastdiff.app.generate import generate, load_model
from fastdiff.images import RECIPE, contact_sheet, write_png

Image = pytest.importorskip("PIL.Image")


def noise(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Random images, uint8 [count, C, H, W], dark enough to be brightened by 50 levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (count, *shape), generator=generator, dtype=torch.uint8)


def folder_of(path: Path, images: Tensor) -> Path:
    path.mkdir(parents=True)
    for number, image in enumerate(images):
        write_png(path / f"{number:04d}.png", image)
    return path


def measured(images: Path, reference: Path | str, **options) -> dict:
    return evaluate(images, str(reference), progress=False, **options)


# == The pixel space ===============================================================================


def test_pixel_features_of_flat_images_by_hand() -> None:
    grey = torch.full((1, 1, 16, 24), 204, dtype=torch.uint8)  # 0.6 in [-1, 1]
    expected = torch.zeros(1, 20).double()
    expected[0, 0] = 8 * 0.6
    torch.testing.assert_close(pixel_features(grey), expected)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    features = pixel_features(red)[0]
    assert features.shape == (28,)
    # Brightness, red - blue, red - 2 green + blue of (1, -1, -1), each over its norm.
    torch.testing.assert_close(features[0], torch.tensor(-8 / 3**0.5).double())
    torch.testing.assert_close(features[16], torch.tensor(8 * 2 / 2**0.5).double())
    torch.testing.assert_close(features[20], torch.tensor(8 * 2 / 6**0.5).double())
    assert features.count_nonzero() == 3 or features.abs().sort().values[-4] < 1e-12


def test_pixel_features_see_waves_and_detail() -> None:
    """A horizontal cosine is one coefficient; a checkerboard has no layout and all the detail."""
    column = torch.arange(8).double() + 0.5
    wave = 127.5 + 100 * torch.cos(torch.pi / 8 * 2 * column)
    image = wave.round().to(torch.uint8).expand(1, 1, 8, 8)
    features = pixel_features(image)[0, :16].view(4, 4)
    exact = (image[0, 0].double() / 127.5 - 1).norm()  # orthonormal: all of the norm
    assert features[0, 2] == pytest.approx(float(exact), rel=1e-3)
    assert features.square().sum() - features[0, 2] ** 2 < 1e-2

    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 255
    features = pixel_features(board.to(torch.uint8).expand(1, 1, 16, 16))[0]
    assert features[:16].abs().max() < 1e-12
    torch.testing.assert_close(features[16:], torch.tensor([16.0, 16.0, 0.0, 0.0]).double())


def test_pixel_layout_does_not_depend_on_the_size() -> None:
    small = noise(5, 3, 8, 8)
    large = small.repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(pixel_features(large)[:, :24], pixel_features(small)[:, :24])


# == The distance ==================================================================================


def test_a_set_against_itself_and_against_a_brighter_one(tmp_path: Path) -> None:
    images = noise(40, 1, 8, 12)
    a = folder_of(tmp_path / "a", images)
    b = folder_of(tmp_path / "b", images + 50)
    assert measured(a, a)["frechet_with_bias"] == pytest.approx(0, abs=1e-6)
    found = measured(a, b)  # only the mean differs: by 50 levels in the first coefficient
    assert found["frechet_with_bias"] == pytest.approx((8 * 50 / 127.5) ** 2, rel=1e-6)
    value, low, high = found["frechet"]
    assert low < value < high
    assert value < found["frechet_with_bias"]  # the bias is positive and taken off


def test_statistics_stand_for_their_folder(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", noise(30, 3, 9, 9, seed=1))
    b = folder_of(tmp_path / "b", noise(50, 3, 9, 9, seed=2))
    saved = tmp_path / "new" / "b.npz"
    only = evaluate(b, save_stats=saved, progress=False)
    assert "frechet" not in only and only["statistics"] == str(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["b.npz"]
    direct, by_file = measured(a, b), measured(a, saved)
    assert by_file["frechet"] == direct["frechet"]
    assert by_file["features"] == direct["features"]
    assert by_file["reference"]["count"] == 50
    assert direct["floor"] is not None and by_file["floor"] is None
    held = Statistics.load(saved)
    assert (held.features, held.count, held.shape) == ("pixels", 50, (3, 9, 9))
    torch.testing.assert_close(held.covariance, held.covariance.T)


def test_floor_is_what_two_halves_of_the_reference_give(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", noise(60, 1, 8, 8, seed=1))
    few, many = (
        measured(a, folder_of(tmp_path / str(count), noise(count, 1, 8, 8, seed=2)))
        for count in (60, 600)
    )
    bright = measured(a, folder_of(tmp_path / "bright", noise(600, 1, 8, 8, seed=2) + 50))
    low, floor, high = (many["floor"][i] for i in (1, 0, 2))
    assert low < floor < high < bright["frechet"][1]
    assert floor < few["floor"][0] / 3  # the bias of the reference goes like 1 / count
    assert bright["floor"] == pytest.approx(many["floor"], abs=1e-5)
    assert measured(a, folder_of(tmp_path / "c", noise(3, 1, 8, 8)))["floor"] is None


def test_a_model_that_takes_more_steps_is_nearer(tmp_path: Path) -> None:
    """The whole way for the digits model, against its held-out scans."""
    model = load_model("digits")
    reports = {}
    for steps in (2, 15):
        folder = generate(
            model, 200, tmp_path / str(steps), steps=steps, solver="ddim", progress=False
        )
        reports[steps] = measured(folder, "digits")
    assert reports[15]["frechet"][2] < reports[2]["frechet"][1]
    report = reports[15]
    assert report["features"]["name"] == "digits" and report["features"]["dimensions"] == 16
    assert (report["images"]["count"], report["reference"]["count"]) == (200, 360)
    assert report["images"]["recipe"]["solver"] == "ddim"
    assert any("not for a claim" in note for note in report["notes"])
    assert json.loads(json.dumps(report)) == report
    text = summary(report)
    for word in ("200 of 1x8x8", "360 of 1x8x8", "ties to even", "no resizing", "bootstrap"):
        assert word in text


def test_an_unfinished_folder_of_samples_is_refused(tmp_path: Path) -> None:
    folder = generate(load_model("digits"), 5, tmp_path / "a", steps=2, progress=False)
    (folder / "000003.png").unlink()
    with pytest.raises(ValueError, match="images must be complete; .* holds 4 of 5"):
        measured(folder, "digits")


# == Inception =====================================================================================


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the package, and where it keeps its weights."""

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: str):
            super().__init__()
            assert (name, layers) == ("inception-v3-compat", ["2048"])
            assert Path(feature_extractor_weights_path).read_bytes() == b"weights"

        def forward(self, images: Tensor) -> tuple[Tensor]:
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            return (images.float().flatten(1)[:, :100],)

    package, part = types.ModuleType("torch_fidelity"), types.ModuleType("inception")
    part.URL_INCEPTION_V3 = "https://example.org/inception.pth"
    part.FeatureExtractorInceptionV3 = Extractor
    package.feature_extractor_inceptionv3 = part
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / "inception.pth"


def test_inception_takes_the_users_package_and_weights(
    tmp_path: Path, torch_fidelity: Path
) -> None:
    a = folder_of(tmp_path / "a", noise(150, 1, 8, 8, seed=1))  # grey is shown as colour
    b = folder_of(tmp_path / "b", noise(150, 1, 8, 8, seed=2))
    with pytest.raises(FileNotFoundError, match="weights, https.*downloads nothing"):
        measured(a, b, features="inception")
    torch_fidelity.parent.mkdir(parents=True)
    torch_fidelity.write_bytes(b"weights")
    found = measured(a, b, features="inception")
    assert found["features"]["dimensions"] == 100
    assert "jackknife of the images, 20 groups" in found["estimator"]
    assert found["frechet"][1] < found["frechet"][0] < found["frechet_with_bias"]


def test_inception_without_the_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="need the packages torch-fidelity"):
        feature_space("inception", (3, 32, 32), "images")


# == Refusals ======================================================================================


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("good") / "images", noise(6, 3, 8, 8))


def test_folders_that_cannot_be_measured(good: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    one = folder_of(tmp_path / "one", noise(1, 3, 8, 8))
    for argument in ("images", "reference"):

        def check(folder: Path, error: type[Exception], word: str) -> None:
            pair = (folder, good) if argument == "images" else (good, folder)  # noqa: B023
            with pytest.raises(error, match=f"{argument} must {word}"):  # noqa: B023
                measured(*pair)

        check(tmp_path / "nowhere", FileNotFoundError, "")
        check(empty, ValueError, "hold images; .* holds none")
        check(one, ValueError, "hold at least 2 images; .* holds 1")
    with pytest.raises(NotADirectoryError, match="images must be a folder"):
        measured(good / "0000.png", good)


def picture(mode: str, size: tuple[int, int] = (8, 8)) -> object:
    return Image.new(mode, size)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("notes.txt", b"text", "images only, directly; .*notes.txt is no image"),
        ("z.png", b"text", "images; .*z.png cannot be read"),
        ("z.png", picture("RGBA"), "8-bit grey or RGB images; .*z.png has mode RGBA"),
        ("z.png", picture("I;16"), "8-bit grey or RGB images; .*z.png has mode I;16"),
        ("z.png", picture("RGB", (9, 8)), "images of one shape, 3x8x8; .*z.png is 3x8x9"),
        ("z.png", picture("L"), "images of one shape, 3x8x8; .*z.png is 1x8x8"),
    ],
)
def test_files_that_cannot_be_measured(
    good: Path, tmp_path: Path, name: str, content: object, word: str
) -> None:
    folder = folder_of(tmp_path / "a", noise(3, 3, 8, 8))
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        content.save(folder / name)
    for pair, argument in (((folder, good), "images"), ((good, folder), "reference")):
        with pytest.raises(ValueError, match=f"{argument} must hold {word}"):
            measured(*pair)


def test_a_truncated_file_and_a_subfolder_are_named(good: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", noise(3, 3, 8, 8))
    whole = (folder / "0001.png").read_bytes()
    (folder / "0001.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="0001.png cannot be read"):
        measured(folder, good)
    (folder / "0001.png").write_bytes(whole)
    (folder / "class0").mkdir()
    with pytest.raises(ValueError, match="class0 is a folder"):
        measured(folder, good)


def test_shapes_and_features_that_do_not_fit(good: Path, tmp_path: Path) -> None:
    larger = folder_of(tmp_path / "larger", noise(4, 3, 16, 16))
    tiny = folder_of(tmp_path / "tiny", noise(4, 3, 8, 4))
    with pytest.raises(ValueError, match="one shape; got 3x8x8 and 3x16x16"):
        measured(good, larger)
    with pytest.raises(ValueError, match="images must be at least 8x8"):
        measured(tiny, good)
    with pytest.raises(ValueError, match="images must be 1x8x8 for features 'digits'"):
        measured(good, "digits")
    with pytest.raises(ValueError, match="features must be one of digits, pixels, inception"):
        measured(good, good, features="nope")
    with pytest.raises(ValueError, match="reference must be a folder or statistics, unless"):
        evaluate(good, progress=False)
    saved = tmp_path / "stats.npz"
    evaluate(good, save_stats=saved, progress=False)
    with pytest.raises(ValueError, match="features must be 'pixels', those of .*; got 'digits'"):
        measured(good, saved, features="digits")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mean": np.array([1.0, np.nan] + [0.0] * 26)}, "finite numbers; .* NaN"),
        ({"covariance": np.full((28, 28), np.inf)}, "finite numbers"),
        ({"covariance": np.eye(27)}, r"covariance \[D, D\]"),
        ({"mean": np.zeros((28, 1))}, r"mean \[D\]"),
        ({"count": 1}, "count >= 2"),
        ({"mean": np.zeros(20), "covariance": np.eye(20)}, "28 features; .* has 20"),
        ({"features": None}, "neither"),
        ({"recipe": "no json"}, "neither"),
    ],
)
def test_statistics_that_cannot_be(good: Path, tmp_path: Path, change: dict, word: str) -> None:
    saved = tmp_path / "stats.npz"
    evaluate(good, save_stats=saved, progress=False)
    with np.load(saved) as file:
        held = {**file, **change}
    np.savez(saved, **{name: value for name, value in held.items() if value is not None})
    with pytest.raises(ValueError, match=f"reference must .*{word}"):
        measured(good, saved)


def test_files_that_are_no_statistics(good: Path, tmp_path: Path) -> None:
    text = tmp_path / "stats.npz"
    text.write_text("no zip")
    with pytest.raises(ValueError, match="reference must be a folder or statistics .* is neither"):
        measured(good, text)
    np.savez(text, mu=np.zeros(4), sigma=np.eye(4))  # somebody else's
    with pytest.raises(ValueError, match="is neither"):
        measured(good, text)
    with pytest.raises(FileNotFoundError, match="reference must exist"):
        measured(good, tmp_path / "none.npz")


# == The sheet =====================================================================================


def test_contact_sheet_shows_every_image_enlarged(tmp_path: Path) -> None:
    images = noise(3, 1, 8, 8)
    folder = folder_of(tmp_path / "a", images)
    contact_sheet(sorted(folder.iterdir()), tmp_path / "new" / "sheet.png", columns=2)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet))
    assert pixels.shape == (2 + 2 * 66, 2 + 2 * 66)
    assert torch.equal(pixels[2:66:8, 2:66:8], images[0, 0])
    assert torch.equal(pixels[2:66:8, 68:132:8], images[1, 0])
    assert torch.equal(pixels[68:132:8, 2:66:8], images[2, 0])
    assert (pixels[68:, 68:] == 255).all()
    assert RECIPE not in {path.name for path in tmp_path.iterdir()}
