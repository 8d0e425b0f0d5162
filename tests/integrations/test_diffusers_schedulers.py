"""The fused schedulers against the stock classes: whole trajectories, contract, state, failures."""

import copy
import inspect
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastdiff.integrations import diffusers_schedulers as fused
from fastdiff.integrations.diffusers.linear_step import NotLinear, SampleForm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BETAS = {"beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"]}
SPACING = {"timestep_spacing": ["leading", "trailing", "linspace"]}
KARRAS = {"use_karras_sigmas": [False, True]}
PREDICTION = {"prediction_type": ["epsilon", "v_prediction", "sample"]}
OPTIONS = {
    "PNDMScheduler": BETAS
    | {"timestep_spacing": ["leading", "trailing"]}
    | {"prediction_type": ["epsilon", "v_prediction"]}
    | {"skip_prk_steps": [False, True], "set_alpha_to_one": [False, True], "steps_offset": [0, 1]},
    "DDIMScheduler": BETAS | SPACING | PREDICTION
    | {"clip_sample": [False, True], "set_alpha_to_one": [False, True],
       "thresholding": [False, False, True], "rescale_betas_zero_snr": [False, False, True]},
    "DDPMScheduler": BETAS | SPACING | PREDICTION
    | {"clip_sample": [False, True],
       "variance_type": ["fixed_small", "fixed_large", "fixed_small_log"]},
    "DPMSolverMultistepScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"solver_order": [1, 2, 3], "solver_type": ["midpoint", "heun"],
       "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"], "lower_order_final": [False, True],
       "euler_at_final": [False, True], "thresholding": [False, False, True]},
    "UniPCMultistepScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"solver_order": [1, 2, 3], "solver_type": ["bh1", "bh2"], "predict_x0": [True, False],
       "disable_corrector": [[], [0, 1]], "lower_order_final": [True, False]},
    "DEISMultistepScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"solver_order": [1, 2, 3], "lower_order_final": [False, True]},
    "EulerDiscreteScheduler": BETAS | SPACING | PREDICTION | KARRAS
    | {"final_sigmas_type": ["zero", "sigma_min"], "timestep_type": ["discrete"]},
    "HeunDiscreteScheduler": SPACING | PREDICTION | KARRAS
    | {"beta_schedule": ["linear", "scaled_linear"], "clip_sample": [False, True]},
    "ScoreSdeVeScheduler": {"sigma_max": [50.0, 1348.0], "snr": [0.1, 0.15]},
}  # fmt: skip
NAMES = list(OPTIONS)
# What the stock classes raise for options, numbers of steps and dtypes that they cannot do.
CANNOT = (AssertionError, IndexError, RuntimeError, ValueError)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configurations(name, count):
    choose = random.Random(name)
    for _ in range(count):
        config = {key: choose.choice(values) for key, values in OPTIONS[name].items()}
        if config.get("algorithm_type", "").startswith("sde") and config["solver_order"] == 3:
            config["solver_type"] = "midpoint"
        yield config


def network(x, t):
    """Smooth, not linear, and different at each time."""
    return (x * (0.4 + 3e-4 * float(t))).tanh()


def trajectory(
    scheduler, steps, dtype=torch.float32, shape=(2, 3, 6, 5), generator=None, **options
):
    """Every state of a run, float64; noise from a generator of its own."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x * scheduler.init_noise_sigma
    predict = getattr(scheduler, "step", None) or scheduler.step_pred
    if "generator" in inspect.signature(predict).parameters:
        options["generator"] = generator or torch.Generator().manual_seed(1)
    states = []
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            output = network(scheduler.scale_model_input(x, t), t)
        if hasattr(scheduler, "step_correct"):
            x = scheduler.step_correct(output, x, generator=options["generator"]).prev_sample
        x = predict(output, t, x, **options).prev_sample
        states.append(x.double())
    return torch.stack(states)


def stock(name, config):
    return getattr(diffusers, name)(**config)


def ours(name, config):
    return getattr(fused, name)(**config)


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


def assert_as_near(found, theirs, exact, slack):
    """Our error is at most twice theirs, and NaN and infinity are where theirs are."""
    if not theirs.isfinite().all():
        assert torch.equal(found.isfinite(), theirs.isfinite())
        return
    scale = exact.abs().flatten(1).amax(1).clamp_min(1e-6).view(-1, *(1,) * (exact.ndim - 1))
    error, allowed = (float(((x - exact) / scale).abs().amax()) for x in (found, theirs))
    assert error <= 2 * allowed + slack


def assert_close(found, wanted, tolerance):
    """Relative to each state's largest value; NaN like NaN."""
    scale = wanted.nan_to_num(0, 0, 0).abs().flatten(1).amax(1).clamp_min(1e-6)
    scale = scale.view(-1, *(1,) * (wanted.ndim - 1))
    torch.testing.assert_close(
        found / scale, wanted / scale, rtol=0, atol=tolerance, equal_nan=True
    )


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


# == Symbols =======================================================================================


def test_forms_do_what_tensors_do():
    """Every operation that forms know, against the tensors they stand for."""
    shape = torch.Size((2, 3))
    a, b = torch.randn(2, *shape, dtype=torch.float64).unbind()
    half = torch.tensor(0.5)
    programs = [
        lambda x, y: half * x - y / 3 + 0,
        lambda x, y: (1 - half) * y - half * x,
        lambda x, y: -(x - y * half) / torch.tensor([[2.0]]),
        lambda x, y: np.float64(1.5) * x + y.to(torch.float32).to(torch.float64),
        lambda x, y: torch.mul(half, x) + torch.add(x, y) - torch.sub(x, y),
        lambda x, y: torch.zeros_like(x) + y,
    ]
    for program in programs:
        form = program(*(SampleForm({(n,): 1.0}, shape, torch.float64) for n in "ab"))
        found = sum(weight * {"a": a, "b": b}[s[0]] for s, weight in form.terms.items())
        wanted = program(a, b)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x * x,
        lambda x: 1 / x,
        lambda x: x + 1,
        lambda x: x.abs(),
        lambda x: torch.exp(x),
        lambda x: x[:, :1],
        lambda x: torch.quantile(x, 0.5),
        lambda x: x if x else x,
        lambda x: x * torch.randn(2, 3),
        lambda x: x.clamp(-1, 1).clamp(-1, 1),
    ],
)
def test_what_forms_cannot_do_is_said(program):
    with pytest.raises(NotLinear):
        program(SampleForm({("a",): 1.0}, torch.Size((2, 3)), torch.float32))
