"""Captured loops: published architectures, the same samples, what the page makes of times."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from bench.entries import captured_loop
from bench.gates import exact_convolutions, gate_of, relative_error
from bench.loops import Graphed, Plain, plain
from bench.measure import OURS
from bench.networks import MODELS
from bench.report import gpu

CPU = torch.device("cpu")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
# Ho et al. 2020 (CIFAR-10 and LSUN), Dhariwal and Nichol 2021 (less its classes), Stable Diffusion.
MILLIONS = {
    "DDPM CIFAR-10": 35.7,
    "EDM 64 px": 295.1,
    "DDPM LSUN 256": 113.7,
    "Stable Diffusion 1.5": 859.5,
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_published_ones(name):
    model = MODELS[name]
    kind = diffusers.UNet2DConditionModel if model.guided else diffusers.UNet2DModel
    with torch.device("meta"):
        network = kind(**model.config)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", MODELS)
def test_gates_are_green(name):
    cells = [cell for cell in captured_loop.cells(CPU, True, 4) if cell.name == name]
    gates = [gate_of(captured_loop.case_of(cell, 2)) for cell in cells]
    assert len(gates) == 2 and all(gate["ok"] for gate in gates)


def test_a_gate_sees_another_solver():
    cell = next(captured_loop.cells(CPU, True, 4))
    swapped = dataclasses.replace(cell, method=dataclasses.replace(cell.method, solver="ipndm"))
    assert not gate_of(captured_loop.case_of(swapped, 2))["ok"]


@pytest.mark.parametrize("kind", ["plain", pytest.param("graphed", marks=GPU)])
def test_stock_loops_make_the_same_samples_however_they_are_run(kind):
    device = CPU if kind == "plain" else torch.device("cuda")
    with torch.inference_mode(), exact_convolutions():
        for cell in captured_loop.cells(device, True, 2):
            noises = [cell.noise(0, 2)]
            wanted = cell.stock(plain, Plain, False, noises)(0)
            found = cell.stock(plain, Plain if kind == "plain" else Graphed, True, noises)(0)
            assert relative_error(found, wanted) <= 1e-5


def test_a_loop_that_is_not_captured_is_no_replay(monkeypatch):
    """Else a gate would compare the loop with itself."""
    monkeypatch.setenv("FASTDIFF_CAPTURE", "0")
    cell = next(captured_loop.cells(CPU, True, 2))
    run = cell.ours(plain, "always", [cell.noise(0, 1)])
    with pytest.raises(RuntimeError, match="not captured"):
        run(0)


def case(ours, **others):
    over = {name: us / ours for name, us in others.items()}
    names = (OURS, *others)
    return {
        "entry": "captured_loop", "row": "net, DDIM", "shape": (4, 3, 8, 8), "steps": 8,
        "p50_us": ours, "over_ours": over, "peak_bytes": dict.fromkeys(names, 10),
        "held_bytes": dict.fromkeys(names, 1000),
    }  # fmt: skip


def test_the_share_of_the_gap_and_what_is_over_the_floor():
    names = captured_loop
    row = gpu._captured(case(810.0, **{
        names.STOCK: 1620.0, names.AUTO: 891.0, names.GRAPHED: 1000.0, names.REPLAYS: 800.0,
        names.OURS_COMPILED: 405.0, names.GRAPHED_COMPILED: 500.0,
    }))  # fmt: skip
    assert row[:3] == ["net, DDIM", "4", "100 us"]
    assert row[3:6] == ["2.00x", "-", "1.10x"]
    assert row[6:9] == ["1.23x", "1.012", "95%"]  # 190 of 200
    assert row[9:12] == ["-"] * 3  # the compiled replays were not measured
    assert row[12:] == ["1.01 kB", "1.01 kB"]


def test_where_nothing_was_measured_the_page_says_how():
    assert gpu.captured({"cpu.json": {"device": "cpu", "cases": {}}}).startswith("Not measured")
