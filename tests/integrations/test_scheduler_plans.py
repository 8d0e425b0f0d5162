"""The plans of the fused schedulers: made once, read by the host never, and what has none."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastdiff.integrations import diffusers_schedulers as fused
from tests.helpers.fused_schedulers import NAMES, assert_close, network, ours, stock, trajectory

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


# == Plans =========================================================================================


def test_a_second_run_makes_no_new_plans():
    scheduler = fused.UniPCMultistepScheduler()
    trajectory(scheduler, 10)
    before = scheduler.describe()["plans"]
    trajectory(scheduler, 10)
    trajectory(scheduler, 10)
    assert scheduler.describe()["plans"] <= before + 1  # last_sample may be there, or not, at first
    assert scheduler.describe()["fused_steps"] == 30


def test_tables_that_are_written_to_are_seen():
    mine, theirs = (
        fused.DDIMScheduler(clip_sample=False),
        diffusers.DDIMScheduler(clip_sample=False),
    )
    trajectory(mine, 5)
    for scheduler in (mine, theirs):
        scheduler.alphas_cumprod *= 0.9
    assert_close(trajectory(mine, 5), trajectory(theirs, 5), 5e-5)
    for scheduler in (mine, theirs):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    assert_close(trajectory(mine, 5), trajectory(theirs, 5), 5e-5)


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a tensor's value."""

    READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy",
             "nonzero"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_planned_step_reads_nothing_back(name):
    scheduler = ours(name, {})
    trajectory(scheduler, 6)
    trajectory(scheduler, 6)
    scheduler.set_timesteps(6)
    x, options = torch.randn(2, 3, 6, 5), {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    reads = HostReads()
    for t in scheduler.timesteps:
        output = scheduler.scale_model_input(x, t)
        with reads:
            x = scheduler.step(output, t, x, **options).prev_sample
    assert reads.seen == [] and scheduler.describe()["host_reads"] == {}


def test_clones_are_requests_of_their_own():
    scheduler = fused.DPMSolverMultistepScheduler(solver_order=3)
    wanted = {seed: None for seed in range(8)}

    def run(mine, seed):
        mine.set_timesteps(12)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in mine.timesteps:
            x = mine.step(network(x, t), t, x).prev_sample
        return x

    for seed in wanted:
        wanted[seed] = run(fused.DPMSolverMultistepScheduler(solver_order=3), seed)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: run(scheduler.clone(), seed), wanted))
    for seed, image in enumerate(found):
        assert torch.equal(image, wanted[seed])
    assert scheduler.describe()["fused_steps"] == 8 * 12


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_by_themselves(copied):
    scheduler = fused.UniPCMultistepScheduler()
    scheduler.set_timesteps(8)
    x = torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    other = copied(scheduler)
    assert type(other) is type(scheduler)
    for t in scheduler.timesteps[4:]:
        e = network(x, t)
        a, b = (s.step(e, t, x).prev_sample for s in (scheduler, other))
        assert torch.equal(a, b)
        x = a


# == What is not fused =============================================================================


@pytest.mark.parametrize(
    "name, config, reason",
    [
        ("DDIMScheduler", {"thresholding": True}, "reshape"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "reshape"),
        ("UniPCMultistepScheduler", {"thresholding": True, "solver_order": 3}, "reshape"),
    ],
)
def test_what_is_not_linear_stays_with_the_stock_class_and_is_counted(name, config, reason):
    scheduler = ours(name, config)
    assert torch.equal(trajectory(scheduler, 5), trajectory(stock(name, config), 5))
    report = scheduler.describe()
    ((why, count),) = report["stock_steps"].items()
    assert reason in why and count == 5 and report["fused_steps"] == 0


def test_gradients_go_through_the_stock_step():
    scheduler = fused.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    scheduler.step(x * 0.1, scheduler.timesteps[0], x).prev_sample.sum().backward()
    assert x.grad is not None and "gradients are asked for" in scheduler.describe()["stock_steps"]
