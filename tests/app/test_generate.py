"""Folders of samples: the same files for any number of processes, images and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.app import generate as module
from fastdiff.app.generate import Model, generate, load_model
from fastdiff.images import RECIPE, from_bytes, read_images, to_bytes
from tests.helpers.threads import threads

Image = pytest.importorskip("PIL.Image")
STEPS = 3
OPTIONS = {"steps": STEPS, "batch": 4, "progress": False}


class Counting(nn.Module):
    """A denoiser of grey 8x8 images that says what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return x * self.weight


def small(denoiser: nn.Module | None = None, channels: int = 1) -> Model:
    schedule = fastdiff.NoiseSchedule.linear_beta()
    return Model("small", denoiser or Counting(), schedule, (channels, 8, 8))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pictures(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != RECIPE}


# == What is written ===============================================================================


def test_files_are_the_samples_of_their_seeds(tmp_path: Path) -> None:
    model = load_model("digits")
    folder = generate(model, 6, tmp_path / "new" / "six", seed_start=5, **OPTIONS)
    assert list(pictures(folder)) == [f"{seed:06d}.png" for seed in range(5, 11)]
    sampler = fastdiff.Sampler(model.denoiser, model.schedule, steps=STEPS)
    seeds = torch.arange(5, 9)
    with threads(1):
        expected = to_bytes(sampler(seeds=seeds, shape=(1, 8, 8), labels=seeds % 10))
    for seed, image in zip(seeds.tolist(), expected, strict=True):
        with Image.open(folder / f"{seed:06d}.png") as picture:
            assert (picture.mode, picture.format) == ("L", "PNG")
            assert np.array_equal(np.array(picture), image[0].numpy())


def test_colour_is_written_as_rgb_without_loss(tmp_path: Path) -> None:
    folder = generate(small(channels=3), 2, tmp_path / "rgb", **OPTIONS)
    sampler = fastdiff.Sampler(Counting(), fastdiff.NoiseSchedule.linear_beta(), steps=STEPS)
    expected = to_bytes(sampler(seeds=range(4), shape=(3, 8, 8)))[:2]
    assert torch.equal(read_images(sorted(folder.glob("*.png")), None, "images"), expected)


def test_rounding_by_hand() -> None:
    x = torch.tensor([-1.0, 1.0, 0.0, 1 / 255, -1.5, 7.0, 2 / 255 - 1, 0.9 / 127.5 - 1])
    assert to_bytes(x).tolist() == [0, 255, 128, 128, 0, 255, 1, 1]
    assert from_bytes(to_bytes(x)[:2]).tolist() == [-1, 1]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(every).float()), every)
    with pytest.raises(ValueError, match="finite"):
        to_bytes(torch.tensor([0.0, float("nan")]))


def test_recipe_says_how_the_images_came_about(tmp_path: Path) -> None:
    folder = generate(load_model("digits"), 3, tmp_path / "a", solver="s_pndm", **OPTIONS)
    recipe = json.loads((folder / RECIPE).read_text())
    assert recipe["num_images"] == 3
    assert (recipe["solver"], recipe["steps"], recipe["calls"]) == ("s_pndm", 3, 4)
    assert (recipe["spacing"], recipe["convention"]) == ("leading", "aligned")
    assert (recipe["seed_start"], recipe["batch"]) == (0, 4)
    assert recipe["labels"] == "seed modulo 10"
    assert "ties to even" in recipe["rounding"]
    assert recipe["model"]["name"] == "digits" and len(recipe["model"]["weights"]) == 16
    assert recipe["made_on"][0]["torch"] == torch.__version__


def test_default_folder_tells_settings_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(small(), 1, solver="ddim", **OPTIONS) == Path("out/small_ddim_3")
    assert (tmp_path / "out/small_ddim_3/000000.png").is_file()


# == Bits ==========================================================================================


def test_images_depend_neither_on_their_number_nor_on_the_start(tmp_path: Path) -> None:
    model = load_model("digits")
    few = pictures(generate(model, 2, tmp_path / "few", **OPTIONS))
    many = pictures(generate(model, 7, tmp_path / "many", **OPTIONS))
    assert few == {name: many[name] for name in few}
    later = pictures(generate(model, 4, tmp_path / "later", seed_start=3, **OPTIONS))
    assert later == {name: many[name] for name in later}


def test_every_call_sees_the_full_batch(tmp_path: Path) -> None:
    model = small()
    generate(model, 6, tmp_path / "a", **OPTIONS)
    assert model.denoiser.calls == [(4, 1, 8, 8)] * (2 * STEPS)


def test_threads_are_left_as_they_were(tmp_path: Path) -> None:
    seen = []

    class Watching(Counting):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x, t)

    with threads(2):
        generate(small(Watching()), 1, tmp_path / "a", **OPTIONS)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    """Seven images in micro-batches of two: shares of two each, the last one padded."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    generate(load_model("digits"), 7, alone, steps=STEPS, batch=2, progress=False)
    command = [*TORCHRUN, "-m", "fastdiff", "sample", "--num-images", "7", "--batch", "2",
               "--steps", str(STEPS), "--out", str(together)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("7 images") == 1  # one process speaks
    assert contents(together) == contents(alone)


SCRIPT = """
import sys
from pathlib import Path
from fastdiff.app.generate import generate, load_model
model, out = load_model("digits"), Path(sys.argv[1])
for name, count in (("a", 5), ("b", 9), ("a", 6)):
    generate(model, count, out / name, steps=3, batch=4, progress=False)
try:
    generate(model, 6, out / "a", steps=3, batch=4, solver="ddim", progress=False)
except ValueError as error:
    sys.stdout.write(f"refused: {error}\\n")  # one write each: two processes share the pipe
    sys.stdout.flush()
"""


def test_processes_go_from_folder_to_folder_and_refuse_together(tmp_path: Path) -> None:
    script, model = tmp_path / "script.py", load_model("digits")
    script.write_text(SCRIPT)
    command = [*TORCHRUN, str(script), str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused: out must be a new folder, or solver stay 'ipndm'") == 2
    for name, count in (("a", 6), ("b", 9)):
        one = generate(model, count, tmp_path / "one" / name, **OPTIONS)
        assert contents(tmp_path / "two" / name) == contents(one)


# == Stopping and going on =========================================================================


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"steps": 20, "batch": 2}
    command = [sys.executable, "-m", "fastdiff", "sample", "--num-images", "40",
               "--out", str(killed)]  # fmt: skip
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not (killed / "000003.png").exists() and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    there = {path.name: path.stat().st_mtime_ns for path in killed.glob("0*.png")}
    assert 4 <= len(there) < 40
    generate(load_model("digits"), 40, killed, **options, progress=False)
    assert {name: (killed / name).stat().st_mtime_ns for name in there} == there  # kept
    generate(load_model("digits"), 40, whole, **options, progress=False)
    assert contents(killed) == contents(whole)  # no leftovers either


def test_what_is_missing_is_made_and_nothing_else(tmp_path: Path) -> None:
    model, folder = small(), tmp_path / "a"
    generate(model, 12, folder, **OPTIONS)
    before = contents(folder)
    (folder / "000005.png").unlink()
    (folder / ".000005.png.part").write_bytes(b"half")
    model.denoiser.calls.clear()
    generate(model, 12, folder, **OPTIONS)
    assert len(model.denoiser.calls) == STEPS  # its micro-batch alone
    assert contents(folder) == before


def test_the_number_of_images_may_grow_but_not_shrink(tmp_path: Path) -> None:
    model = small()
    folder = generate(model, 3, tmp_path / "a", **OPTIONS)
    generate(model, 6, folder, **OPTIONS)
    assert len(pictures(folder)) == 6
    assert contents(folder) == contents(generate(model, 6, tmp_path / "b", **OPTIONS))
    with pytest.raises(ValueError, match="num_images must be at least 6"):
        generate(model, 3, folder, **OPTIONS)


def test_a_stop_in_the_middle_of_a_file_leaves_no_half_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    whole = module.write_png

    def stopping(path: Path, image: Tensor) -> None:
        if len(written) == 2:
            path.with_name(f".{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        whole(path, image)

    monkeypatch.setattr(module, "write_png", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate(small(), 4, tmp_path / "a", **OPTIONS)
    monkeypatch.undo()
    assert [p.name for p in sorted((tmp_path / "a").glob("0*.png"))] == ["000000.png", "000001.png"]
    folder = generate(small(), 4, tmp_path / "a", **OPTIONS)
    assert contents(folder) == contents(generate(small(), 4, tmp_path / "b", **OPTIONS))


# == Refusals ======================================================================================


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"solver": "ddim"}, "solver stay 'ipndm'"),
        ({"steps": 4}, "steps stay 3"),
        ({"batch": 5}, "batch stay 4"),
        ({"seed_start": 1}, "seed_start stay 0"),
        ({"spacing": "trailing"}, "spacing stay 'leading'"),
        ({"label": 3}, "labels stay 'seed modulo 10'"),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, change: dict, word: str) -> None:
    model = load_model("digits")
    folder = generate(model, 1, tmp_path / "a", **OPTIONS)
    before = contents(folder)
    with pytest.raises(ValueError, match="out must be a new folder, or " + word):
        generate(model, 1, folder, **{**OPTIONS, **change})
    assert contents(folder) == before


def test_other_weights_are_refused(tmp_path: Path) -> None:
    generate(small(), 1, tmp_path / "a", **OPTIONS)
    other = Counting()
    other.weight.fill_(0.25)
    with pytest.raises(ValueError, match="model stay"):
        generate(small(other), 1, tmp_path / "a", **OPTIONS)


def test_a_folder_of_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds images but no {RECIPE}"):
        generate(small(), 1, tmp_path, **OPTIONS)
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        generate(small(), 1, tmp_path / "mine.jpg", **OPTIONS)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_images": 0}, "num_images must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"seed_start": -1}, "seed_start must be at least 0"),
        ({"label": 0}, "label must be left out"),
        ({"solver": "nope"}, "solver must be one of"),
        ({"steps": 0}, "steps must be"),
        ({"convention": "nope"}, "convention must be one of"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict, word: str
) -> None:
    arguments = {"num_images": 2, **OPTIONS, **change}
    with pytest.raises(ValueError, match=word):
        generate(small(), out=tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_label_must_be_one_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label must be 0 \.\. 9; got 10"):
        generate(load_model("digits"), 1, tmp_path / "a", label=10, **OPTIONS)


def test_an_image_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Broken(Counting):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            x = super().forward(x, t)
            x[2] = float("nan")
            return x

    with pytest.raises(ValueError, match="seed 6 is not finite"):
        generate(small(Broken()), 3, tmp_path / "a", seed_start=4, **OPTIONS)


def test_channels_that_no_png_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or 3 channels"):
        generate(small(channels=4), 1, tmp_path / "a", **OPTIONS)


# == diffusers folders =============================================================================


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny, untrained, class-conditional DDPM pipeline, saved by diffusers."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=(8, 16), in_channels=3, out_channels=3, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, num_class_embeds=3,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=1e-3, beta_end=0.015,
        prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def test_a_diffusers_folder_is_sampled_as_its_config_says(pipeline: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = load_model(str(pipeline))
    assert (model.name, model.shape, model.classes) == ("tiny", (3, 8, 16), 3)
    assert (model.prediction, model.schedule.spacing) == ("v_prediction", "trailing")
    folder = generate(model, 4, tmp_path / "a", **OPTIONS)
    unet = diffusers.UNet2DModel.from_pretrained(pipeline / "unet").eval()
    sampler = fastdiff.Sampler(
        lambda x, t, labels: unet(x, t, class_labels=labels).sample,
        fastdiff.NoiseSchedule.scaled_linear_beta(1e-3, 0.015),
        steps=STEPS, prediction="v_prediction", spacing="trailing",
    )  # fmt: skip
    labels = torch.arange(4) % 3
    expected = to_bytes(sampler(seeds=range(4), shape=(3, 8, 16), labels=labels))
    found = read_images(sorted(folder.glob("*.png")), (3, 8, 16), "images")
    assert (found.int() - expected.int()).abs().max() <= 1  # threads may round a tie otherwise


def test_a_folder_without_subfolders_is_the_same_model(pipeline: Path, tmp_path: Path) -> None:
    flat = tmp_path / "tiny"
    flat.mkdir()
    for path in [*(pipeline / "unet").iterdir(), *(pipeline / "scheduler").iterdir()]:
        (flat / path.name).write_bytes(path.read_bytes())
    found = []
    for folder in (pipeline, flat):
        out = generate(load_model(str(folder)), 2, tmp_path / str(len(found)), **OPTIONS)
        found.append(read_images(sorted(out.glob("*.png")), (3, 8, 16), "images").int())
    assert (found[0] - found[1]).abs().max() <= 1  # a network read again promises no equal bits


def test_folders_that_are_no_model_are_refused(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder 'google/ddpm"):
        load_model("google/ddpm-cifar10-32")  # a name on a hub is not looked up
    with pytest.raises(FileNotFoundError, match="unet/config.json or config.json"):
        load_model(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "UNet2DConditionModel"}')
    (tmp_path / "scheduler_config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be an unconditional UNet2DModel"):
        load_model(str(tmp_path))
    config.write_text('{"_class_name": "UNet2DModel", "sample_size": null}')
    with pytest.raises(ValueError, match="sample_size"):
        load_model(str(tmp_path))
    (tmp_path / "vqvae").mkdir()
    with pytest.raises(ValueError, match="not latents"):
        load_model(str(tmp_path))


def test_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert module.first_process()
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert not module.first_process()
