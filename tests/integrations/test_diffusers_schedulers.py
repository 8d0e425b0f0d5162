"""The fused schedulers against the stock classes: whole trajectories, contract, failures."""

import inspect

import diffusers
import pytest
import torch

from fastdiff.integrations import diffusers_schedulers as fused
from tests.helpers.fused_schedulers import (
    NAMES,
    assert_as_near,
    assert_close,
    configurations,
    network,
    ours,
    stock,
    trajectory,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
# What the stock classes raise for options, numbers of steps and dtypes that they cannot do.
CANNOT = (AssertionError, IndexError, RuntimeError, ValueError)


# == Parity ========================================================================================


@pytest.mark.parametrize("name", NAMES)
def test_whole_trajectories_are_those_of_the_stock_class(name):
    """10 random configurations x 5 step counts, float64 and float32, and again from the plans."""
    counted = 0
    for config in configurations(name, 10):
        scheduler = ours(name, config)
        for steps in (1, 2, 5, 10, 25):
            try:
                exact = trajectory(stock(name, config), steps, torch.float64)
            except CANNOT as error:
                with pytest.raises(type(error)):
                    trajectory(scheduler, steps)
                scheduler = ours(name, config)
                continue
            assert_close(trajectory(scheduler, steps, torch.float64), exact, 2e-5)
            theirs = trajectory(stock(name, config), steps)
            for _ in range(2):
                assert_as_near(trajectory(scheduler, steps), theirs, exact, 2e-5)
        counted += scheduler.describe()["fused_steps"]
    assert counted > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES[:-1])
def test_sixteen_bits_are_as_near_to_float64_as_the_stock_class(name, dtype):
    compared = 0
    for config in configurations(name, 4):
        if "thresholding" in config:
            config["thresholding"] = False
        try:
            theirs = trajectory(stock(name, config), 6, dtype)
            exact = trajectory(stock(name, config), 6, torch.float64)
        except CANNOT:
            continue
        assert_as_near(trajectory(ours(name, config), 6, dtype), theirs, exact, 1e-3)
        compared += 1
    assert compared


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_comes_from_the_same_generators(name):
    config = {"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else {}
    options = {"eta": 1.0} if name == "DDIMScheduler" else {}
    for several in (False, True):

        def generators(several=several):
            made = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
            return made if several else made[0]

        theirs, mine = generators(), generators()
        wanted = trajectory(stock(name, config), 6, generator=theirs, **options)
        scheduler = ours(name, config)
        assert_close(trajectory(scheduler, 6, generator=mine, **options), wanted, 5e-5)
        assert scheduler.describe()["stock_steps"] == {}
        after = [torch.rand(1, generator=g[0] if several else g) for g in (theirs, mine)]
        assert torch.equal(*after)


def test_every_field_of_the_output_is_the_stock_one():
    x, e = torch.randn(2, 1, 3, 4, 4).unbind()
    for name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"):
        a, b = stock(name, {}), ours(name, {})
        for scheduler in (a, b):
            scheduler.set_timesteps(5)
            scheduler.is_scale_input_called = True
        wanted, found = (s.step(e, s.timesteps[-1], x) for s in (a, b))
        assert type(found) is type(wanted) and found.keys() == wanted.keys()
        torch.testing.assert_close(found.pred_original_sample, wanted.pred_original_sample)
        for scheduler in (a, b):
            scheduler._step_index = None
        pair = b.step(e, b.timesteps[-1], x, return_dict=False)
        assert isinstance(pair, tuple) and torch.equal(pair[0], found.prev_sample)


# == The contract ==================================================================================


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_stock_class_by_name_signature_and_config(name, tmp_path):
    theirs, mine = getattr(diffusers, name), getattr(fused, name)
    assert issubclass(mine, theirs) and mine.__name__ == name
    assert inspect.signature(mine.__init__) == inspect.signature(theirs.__init__)
    for method in ("step", "step_pred", "step_prk", "set_timesteps"):
        if hasattr(theirs, method):
            assert inspect.signature(getattr(mine, method)) == inspect.signature(
                getattr(theirs, method)
            )
    config = next(configurations(name, 1))
    a, b = theirs(**config), mine(**config)
    assert dict(a.config) == dict(b.config)
    assert dict(mine.from_config(a.config).config) == dict(theirs.from_config(b.config).config)
    b.set_timesteps(4)
    b.save_pretrained(tmp_path)
    loaded = theirs.from_pretrained(tmp_path).config
    assert all(loaded[k] == v for k, v in a.config.items() if not k.startswith("_"))
    assert type(mine.from_pretrained(tmp_path)) is mine
    assert "_fusion" not in (tmp_path / "scheduler_config.json").read_text()


def test_a_foreign_config_comes_back_unharmed():
    start = diffusers.UniPCMultistepScheduler(solver_order=3, disable_corrector=[2])
    there = fused.DDIMScheduler.from_config(start.config)
    back = fused.UniPCMultistepScheduler.from_config(there.config)
    assert (back.config.solver_order, back.config.disable_corrector) == (3, [2])


def test_compatibles_and_pipelines_see_the_stock_place():
    assert diffusers.DDIMScheduler in fused.PNDMScheduler().compatibles
    assert fused.PNDMScheduler.__module__.startswith("diffusers.")


def test_history_may_be_assigned_and_is_not_written():
    given = [torch.randn(1, 3, 4, 4) for _ in range(3)]
    kept = [g.clone() for g in given]
    x, e = torch.randn(2, 1, 3, 4, 4).unbind()
    results = []
    for make in (stock, ours):
        scheduler = make("PNDMScheduler", {"skip_prk_steps": True})
        scheduler.set_timesteps(10)
        scheduler.ets, scheduler.counter = list(given), 5
        results.append(scheduler.step_plms(e, scheduler.timesteps[5], x).prev_sample)
        scheduler = make("DPMSolverMultistepScheduler", {"solver_order": 3})
        scheduler.set_timesteps(10)
        scheduler.model_outputs, scheduler.lower_order_nums = list(given), 3
        results.append(scheduler.step(e, scheduler.timesteps[5], x).prev_sample)
    torch.testing.assert_close(results[:2], results[2:])
    assert all(map(torch.equal, given, kept))


def test_prk_and_plms_by_themselves():
    x, e = torch.randn(2, 1, 3, 4, 4).unbind()
    scheduler = fused.PNDMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="prk"):
        scheduler.step_plms(e, 1, x)
    assert scheduler.step_prk(e, 0, x).prev_sample.shape == x.shape


@pytest.mark.parametrize("name", NAMES[:-1])
def test_shapes_layouts_and_plain_numbers(name):
    theirs, mine = stock(name, {}), ours(name, {})
    base = torch.randn(2, 4, 6, 5, 3)
    for x, e in ((base[0].permute(3, 0, 1, 2), base[1].permute(3, 0, 1, 2)), base[:, :, :, 0, 0]):
        results = []
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(7)
            scheduler.is_scale_input_called = True
            t = scheduler.timesteps[3]
            t = float(t) if name == "EulerDiscreteScheduler" else int(t)
            results.append(scheduler.step(e, t, x).prev_sample)
        if name != "DDPMScheduler":  # which draws noise
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert mine.describe()["fused_steps"] == 2


def test_running_twice_with_only_the_index_reset():
    for name in ("UniPCMultistepScheduler", "DEISMultistepScheduler"):
        x, results = torch.randn(1, 3, 4, 4), []
        for scheduler in (stock(name, {}), ours(name, {})):
            scheduler.set_timesteps(6)
            state = x
            for _ in range(2):
                for t in scheduler.timesteps:
                    state = scheduler.step(network(state, t), t, state).prev_sample
                scheduler._step_index = None
            results.append(state)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_given_timesteps_and_begin_index():
    for config in ({"timesteps": [900, 500, 100]}, None):
        results = []
        for make in (stock, ours):
            scheduler = make("DPMSolverMultistepScheduler", {})
            if config:
                scheduler.set_timesteps(**config)
            else:
                scheduler.set_timesteps(10)
                scheduler.set_begin_index(4)
            x = torch.ones(1, 3, 4, 4)
            for t in scheduler.timesteps[0 if config else 4 :]:
                x = scheduler.step(network(x, t), t, x).prev_sample
            noisy = scheduler.add_noise(x, x, scheduler.timesteps[:1])
            results.append((x, noisy))
        torch.testing.assert_close(*results)


def bad_calls():
    x = torch.randn(1, 3, 4, 4)
    yield "no set_timesteps", {}, lambda s: s.step(x, 1, x)
    yield "wrong prediction", {"prediction_type": "nonsense"}, lambda s: (
        s.set_timesteps(3), s.step(x, s.timesteps[0], x))  # fmt: skip
    yield "shapes", {}, lambda s: (s.set_timesteps(3), s.step(x[..., :2], s.timesteps[0], x))
    yield "arguments", {}, lambda s: (s.set_timesteps(3), s.step(x, s.timesteps[0]))
    yield "an unknown one", {}, lambda s: (
        s.set_timesteps(3), s.step(x, s.timesteps[0], x, colour=1))  # fmt: skip
    yield "steps", {}, lambda s: s.set_timesteps(5000)


@pytest.mark.parametrize("what, config, call", list(bad_calls()), ids=lambda v: str(v)[:20])
def test_bad_input_gets_the_stock_error(what, config, call):
    outcomes = []
    for make in (stock, ours):
        try:
            call(make("DDIMScheduler", config))
            outcomes.append(None)
        except Exception as error:  # noqa: BLE001 - whatever stock raises
            outcomes.append((type(error), str(error).replace("FusedStep.", "DDIMScheduler.")))
    assert outcomes[0] is not None and outcomes[0] == outcomes[1]
