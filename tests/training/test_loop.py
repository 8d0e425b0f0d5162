"""The training loop: exact resume after any kind of death, data parallel, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdiff import files
from fastdiff.training import loop
from fastdiff.training.loop import LoopConfig, train

STEPS = 40

# A run with everything that could break resume: dropout, moments, EMA, clipping, a rate schedule, a
# BatchNorm buffer and a history entry under way when a checkpoint is written.
RUN = f"""
import sys, time, torch, torch.distributed as dist
from torch import nn
from fastdiff.training.loop import LoopConfig, train

def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.SiLU(), nn.Dropout(0.3),
    nn.Linear(32, 6))

def batches(step, generator):
    x = torch.randn(8, 6, generator=generator)
    return {{"x": x, "target": x.flip(1), "scale": torch.tensor(2.0)}}

def loss(module, batch):
    time.sleep(delay)
    return batch["scale"] * (module(batch["x"]) - batch["target"]).square().mean()

def go(out, steps={STEPS}, **changes):
    module = net()
    return train(
        module, torch.optim.AdamW(module.parameters(), lr=0.01), loss, batches,
        LoopConfig(**{{**dict(steps=steps, seed=5, ema_decay=0.9, log_every=7, save_every=5,
        evaluate_every=9), **changes}}), learning_rate=lambda step: 1 - step / {STEPS},
        evaluate=lambda ema: {{"norm": float(sum(p.square().sum() for p in ema.parameters()))}},
        out=out, progress=False,
    )
"""

namespace = {"delay": 0.0}
exec(RUN, namespace)
go = namespace["go"]


def contents(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return load_file(out / loop.CHECKPOINT), _progress(out)["history"]


def _progress(out: Path) -> dict:
    return json.loads((out / loop.CHECKPOINT).with_suffix(".json").read_text())["progress"]


def assert_same_run(one: Path, two: Path) -> None:
    (tensors, history), (others, other_history) = contents(one), contents(two)
    assert tensors.keys() == others.keys()
    assert {name.split(".")[0] for name in tensors} == {"module", "ema", "optimizer"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert history == other_history


def start(out: Path, delay: float) -> subprocess.Popen[bytes]:
    code = f"import torch; torch.set_num_threads(1)\n{RUN}\ndelay = {delay}\ngo({str(out)!r})"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    go(out)
    return out


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_resume_after_death_is_bit_equal(
    whole: Path, tmp_path: Path, death: signal.Signals
) -> None:
    process = start(tmp_path, delay=0.1)
    while not (tmp_path / loop.CHECKPOINT).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.15)
    process.send_signal(death)
    assert process.wait(timeout=30) == -death
    reached = _progress(tmp_path)["step"]
    assert 5 <= reached < STEPS
    if death == signal.SIGKILL:
        assert reached % 5 == 0  # only what was saved on schedule
    go(tmp_path)
    assert_same_run(whole, tmp_path)


def test_resume_in_another_place_is_bit_equal(whole: Path, tmp_path: Path) -> None:
    go(tmp_path, steps=13)
    # The last step of a shorter run logs and evaluates: an entry the whole run does not have.
    go(tmp_path)
    tensors, _ = contents(tmp_path)
    for name, tensor in contents(whole)[0].items():
        assert torch.equal(tensor, tensors[name]), name


def test_seed_changes_the_run(whole: Path, tmp_path: Path) -> None:
    go(tmp_path, seed=6)
    name = "module.0.weight"
    assert not torch.equal(contents(whole)[0][name], contents(tmp_path)[0][name])


def test_caller_keeps_its_random_state(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    module = nn.Linear(2, 2)
    torch.set_rng_state(before)
    train(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        lambda m, b: m(b["x"]).square().mean(),
        lambda step, g: {"x": torch.randn(4, 2, generator=g)},
        LoopConfig(steps=3),
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), before)


def plain_run(steps: int, **changes: object) -> loop.Trained:
    """Linear regression by plain gradient descent: everything can be computed by hand."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    return train(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        lambda m, b: (m(b["x"]) - b["y"]).square().mean(),
        lambda step, g: {"x": torch.tensor([[1.0, 2.0]]), "y": torch.tensor([[1.0]])},
        LoopConfig(**{"steps": steps, **changes}),  # type: ignore[arg-type]
        progress=False,
    )


def test_average_and_clipping_by_hand() -> None:
    # gradient at zero: -2 (1, 2), norm 2 sqrt 5; clipped to 1, times 0.1.
    done = plain_run(1, clip_norm=1.0, ema_decay=0.5)
    expected = 0.1 * torch.tensor([[1.0, 2.0]]) / 5**0.5
    torch.testing.assert_close(done.module.weight.detach(), expected)
    # the average begins at the initial weights (zero) and moves by 1 - min(0.5, 1/10)
    torch.testing.assert_close(done.ema.weight, 0.9 * expected)
    unclipped = plain_run(1, clip_norm=None)
    torch.testing.assert_close(unclipped.module.weight.detach(), 0.2 * torch.tensor([[1.0, 2.0]]))


def test_amp_runs_the_loss_in_low_precision() -> None:
    seen = []
    module = nn.Linear(2, 2)

    def loss(m: nn.Module, b: loop.Batch) -> torch.Tensor:
        y = m(b["x"])
        seen.append(y.dtype)
        return y.float().square().mean()

    train(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        loss,
        lambda step, g: {"x": torch.ones(4, 2)},
        LoopConfig(steps=2, amp="bfloat16"),
        progress=False,
    )
    assert seen == [torch.bfloat16] * 2
    assert module.weight.dtype == torch.float32


def test_best_average_is_kept(tmp_path: Path) -> None:
    values, weights = iter([3.0, 1.0, 2.0]), []

    def evaluate(ema: nn.Module) -> dict[str, float]:
        weights.append(ema.weight.clone())
        return {"score": next(values)}

    module = nn.Linear(2, 2)
    done = train(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        lambda m, b: m(b["x"]).square().mean(),
        lambda step, g: {"x": torch.randn(4, 2, generator=g)},
        LoopConfig(steps=6, evaluate_every=2, keep_best="score"),
        evaluate=evaluate,
        out=tmp_path,
        progress=False,
    )
    assert done.progress.best == {"step": 4, "score": 1.0}
    assert torch.equal(load_file(tmp_path / loop.BEST)["weight"], weights[1])


def test_broken_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)

    def loss(m: nn.Module, b: loop.Batch) -> torch.Tensor:
        return m(b["x"]).square().mean()

    def batches(step: int, generator: torch.Generator) -> loop.Batch:
        return {"x": torch.full((2, 1), float("nan") if step >= 6 else 1.0)}

    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    with pytest.raises(FloatingPointError, match="not finite"):
        config = LoopConfig(steps=20, save_every=4, log_every=3)
        train(module, optimizer, loss, batches, config, out=tmp_path, progress=False)
    assert _progress(tmp_path)["step"] == 4
    assert all(t.isfinite().all() for t in contents(tmp_path)[0].values())


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, {"a": torch.ones(3)}, {"n": 1}, beside=True)

    def fail(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_tensors(path, {"a": torch.zeros(3)}, {"n": 2}, beside=True)
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"ema_decay": 1.0}, {"clip_norm": 0.0}, {"amp": "int8"}, {"save_every": 0}],
)
def test_config_says_what_is_wrong(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        LoopConfig(**{"steps": 1, **fields})  # type: ignore[arg-type]


def test_checkpoint_of_another_run_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed must stay 5"):
        go(whole, seed=7)
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not fit"):
        train(
            module,
            torch.optim.AdamW(module.parameters()),
            lambda m, b: m(b["x"]).sum(),
            lambda step, g: {"x": torch.ones(1, 2)},
            LoopConfig(steps=50, seed=5, ema_decay=0.9, log_every=7, evaluate_every=9),
            out=whole,
            progress=False,
        )


def test_works_outside_the_main_thread() -> None:
    done: list[loop.Trained] = []
    thread = threading.Thread(target=lambda: done.append(plain_run(2)))
    thread.start()
    thread.join()
    assert done[0].progress.step == 2


PARALLEL = """
import sys, os, torch, torch.distributed as dist
from torch import nn
from fastdiff.training.loop import LoopConfig, train
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())           # rank 0's weights must win
module = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))
train(
    module, torch.optim.AdamW(module.parameters(), lr=0.01),
    lambda m, b: (m(b["x"]) - b["x"].flip(1)).square().mean(),
    lambda step, g: {"x": torch.randn(8, 6, generator=g)},
    LoopConfig(steps=30, log_every=10), out=sys.argv[1], progress=False,
)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(PARALLEL)
    root = str(Path(loop.__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    for world in (1, 2):
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        subprocess.run(
            [sys.executable, *command, str(script), str(tmp_path / str(world))],
            check=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )
    (one, history), (two, other) = contents(tmp_path / "1"), contents(tmp_path / "2")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    assert [e["loss"] for e in other] == pytest.approx([e["loss"] for e in history], rel=1e-5)
