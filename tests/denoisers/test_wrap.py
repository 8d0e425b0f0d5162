"""Networks of other projects behind the sampler's call: real classes, at small sizes."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.denoisers.network import unpacked
from fastdiff.integrations.diffusers.networks import DiffusersUNet, FlowTransformer
from fastdiff.integrations.edm import EDMNetwork
from fastdiff.integrations.k_diffusion.networks import KDiffusionDenoiser
from tests.helpers.tensors import normal

SMALL = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1,
         "norm_num_groups": 8}  # fmt: skip
TEXT = {
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def made(network):
    torch.manual_seed(0)
    return network().eval().requires_grad_(False)


def unet(**options):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    return made(lambda: diffusers.UNet2DModel(**(SMALL | blocks | options)))


def text_unet(**options):
    return made(lambda: diffusers.UNet2DConditionModel(**(SMALL | TEXT | options)))


# == diffusers' UNets ==============================================================================


def test_unet2d_samples_as_its_pipeline_does():
    """DDIM over the wrapped UNet against diffusers' own loop, class labels included."""
    network = unet(num_class_embeds=10)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(7)
    noise, labels = normal(2, 3, 8, 8), torch.tensor([3, 7])
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, class_labels=labels).sample, t, x).prev_sample
    denoiser = fastdiff.wrap(network, schedule=scheduler)
    assert isinstance(denoiser, DiffusersUNet) and denoiser.prediction.name == "epsilon"
    found = fastdiff.Sampler(denoiser, solver="ddim", steps=7)(noise, class_labels=labels)
    # set_alpha_to_one is diffusers' default: the same clean end.
    assert float((found - x).abs().max() / x.abs().max()) < 1e-4


def test_added_conditions_pass_through_and_are_guided():
    """An SDXL-like UNet: nested conditioning is doubled like the rest."""
    network = text_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    cond, uncond = (
        {
            "encoder_hidden_states": normal(2, 5, 16, seed=s),
            "added_cond_kwargs": {
                "text_embeds": normal(2, 16, seed=s + 10),
                "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2),
            },
        }
        for s in (1, 2)
    )
    noise = normal(2, 4, 8, 8)
    schedule = fastdiff.NoiseSchedule.scaled_linear_beta()
    found = fastdiff.Sampler(fastdiff.wrap(network, schedule=schedule), steps=3)(
        noise, guidance_scale=2.0, uncond=uncond, **cond
    )

    def guided(x, t):
        c, u = (network(x, t, **a).sample for a in (cond, uncond))
        return u + 2.0 * (c - u)

    wanted = fastdiff.Sampler(guided, schedule, steps=3)(noise)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_sequences_are_doubled_under_guidance():
    """As residuals of a ControlNet are handed over."""
    seen = {}

    def network(x, t, residuals, names):
        seen["shapes"], seen["names"] = [tuple(r.shape) for r in residuals], names
        return 0 * x

    schedule = fastdiff.NoiseSchedule.linear_beta()
    sampler = fastdiff.Sampler(network, schedule, steps=1)
    residuals = (normal(2, 4), normal(2, 5))
    sampler(normal(2, 3, 4, 4), guidance_scale=2.0, residuals=residuals, names=["a", "b"])
    assert seen == {"shapes": [(4, 4), (4, 5)], "names": ["a", "b"]}
    with pytest.raises(ValueError, match=r"uncond\['residuals'\] must have 2 entries; got 1"):
        sampler(normal(2, 3, 4, 4), guidance_scale=2.0, residuals=residuals, names=[],
                uncond={"residuals": residuals[:1]})  # fmt: skip


def test_full_configurations_on_the_meta_device():
    """Stable Diffusion 1.5's UNet as it is, without memory for its weights."""
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        )
        denoiser = fastdiff.wrap(network)
        assert sum(p.numel() for p in denoiser.parameters()) == 859_520_964
        output = denoiser(
            torch.empty(2, 4, 64, 64), torch.empty(2), encoder_hidden_states=torch.empty(2, 77, 768)
        )
    assert output.shape == (2, 4, 64, 64)


def test_half_precision_and_compiled_networks():
    network = unet().half()
    schedule = fastdiff.NoiseSchedule.linear_beta()
    denoiser = fastdiff.wrap(network, schedule=schedule)
    x = fastdiff.Sampler(denoiser, steps=2)(normal(1, 3, 8, 8))
    assert x.dtype == torch.float32 and x.isfinite().all()
    wrapped = fastdiff.wrap(torch.compile(unet(), backend="eager"))
    assert isinstance(wrapped, DiffusersUNet) and "UNet2DModel" in repr(wrapped)


def test_a_local_folder(tmp_path):
    network = unet()
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    noise = normal(1, 3, 8, 8)
    sampler = fastdiff.accelerate(tmp_path, steps=4)
    found = sampler(noise)
    wanted = fastdiff.accelerate(network, scheduler, steps=4)(noise)
    # Weights read from a file lie at other addresses, where convolutions may round otherwise.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert sampler.tableau.clip == (-1.0, 1.0)  # clip_sample


# == Flow matching =================================================================================


@pytest.fixture(scope="module")
def transformer():
    return made(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
            pooled_projection_dim=16, out_channels=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_matching_transformer_end_to_end(transformer, shift):
    """Euler over the wrapped network against diffusers' flow-matching loop on the same sigmas."""
    conditions = {
        "encoder_hidden_states": normal(2, 6, 32),
        "pooled_projections": normal(2, 16),
    }
    noise = normal(2, 4, 8, 8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(6)
    x = noise
    for t in scheduler.timesteps:
        output = transformer(x, timestep=t.expand(2), **conditions).sample
        x = scheduler.step(output, t, x).prev_sample
    denoiser = fastdiff.wrap(transformer, schedule=scheduler)
    assert isinstance(denoiser, FlowTransformer) and denoiser.prediction.name == "flow"
    times = scheduler.sigmas.double().tolist()
    found = fastdiff.Sampler(denoiser, solver="euler", spacing=times)(noise, **conditions)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_what_a_flow_transformer_needs_is_named(transformer):
    denoiser = fastdiff.wrap(transformer)
    with pytest.raises(ValueError, match="encoder_hidden_states must be given; got no cond"):
        denoiser(normal(1, 4, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match="pooled_projections must be given; got encoder_hidden"):
        denoiser(normal(1, 4, 8, 8), torch.ones(1), encoder_hidden_states=normal(1, 6, 32))
    with pytest.raises(ValueError, match="prediction must be 'flow'.*got 'epsilon'"):
        fastdiff.wrap(transformer, prediction="epsilon")


# == EDM and k-diffusion ===========================================================================


class Preconditioned(nn.Module):
    """A network of EDM's interface, from the paper's table 1: c_skip x + c_out F(c_in x, c_noise).

    F is a linear map of its input, c_noise and the labels.
    """

    sigma_data, sigma_min, sigma_max = 0.5, 0.0, math.inf
    img_channels, img_resolution = 3, 8

    def __init__(self, classes=0):
        super().__init__()
        self.label_dim = classes
        self.mix = nn.Parameter(0.3 * normal(3, 3))

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        x, sigma = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        f = torch.einsum("ij,bjhw->bihw", self.mix, x / total.sqrt()) + 0.1 * sigma.log() / 4
        if class_labels is not None:
            f = f + class_labels.argmax(1).reshape(-1, 1, 1, 1)
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * f


def edm_sampler(net, noise, labels, steps, churn=0.0, draws=()):
    """Algorithm 2 of Karras et al. 2022 in float64, on its grid (eq. 5)."""
    i = torch.arange(steps, dtype=torch.float64)
    low, high = (s ** (1 / 7) for s in (0.002, 80.0))
    t = torch.cat([(high + i / (steps - 1) * (low - high)) ** 7, torch.zeros(1).double()])
    draws = iter(draws)
    x = noise.double() * t[0]
    gamma = min(churn / steps, math.sqrt(2) - 1)
    for a, b in zip(t, t[1:], strict=False):
        if gamma:
            hat = a * (1 + gamma)
            x, a = x + (hat**2 - a**2).sqrt() * next(draws).double(), hat
        d = (x - net(x, a.expand(len(x)), labels).double()) / a
        y = x + (b - a) * d
        if b > 0:
            d = (d + (y - net(y, b.expand(len(x)), labels).double()) / b) / 2
            y = x + (b - a) * d
        x = y
    return x


def test_an_edm_network_against_its_published_sampler():
    network = Preconditioned(classes=4).requires_grad_(False)
    noise, labels = normal(2, 3, 8, 8), torch.eye(4)[[1, 3]]
    denoiser = fastdiff.wrap(network)
    assert isinstance(denoiser, EDMNetwork) and denoiser.schedule.first == 80
    found = fastdiff.Sampler(denoiser, solver="heun", steps=9)(noise, class_labels=labels)
    wanted = edm_sampler(network, noise, labels, 9)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_a_network_of_fewer_levels_cuts_the_schedule():
    network = Preconditioned()
    network.sigma_min, network.sigma_max = 0.01, 60.0
    schedule = fastdiff.wrap(network).schedule
    assert (schedule.first, schedule.last) == (60.0, 0.01)
    del Preconditioned.sigma_min  # as EDM2's networks: no bounds, no rounding
    try:
        later = SimpleNamespace(img_resolution=8, label_dim=0, sigma_data=0.5)
        assert EDMNetwork.recognises(later)
    finally:
        Preconditioned.sigma_min = 0.0


@pytest.mark.parametrize(
    "classes, labels, words",
    [(4, torch.tensor([1, 2]), r"one-hot, \[2, 4\]; got shape \(2,\)"),
     (0, torch.zeros(2, 0), "left out: no classes")],
)  # fmt: skip
def test_labels_of_another_kind_are_named(classes, labels, words):
    denoiser = fastdiff.wrap(Preconditioned(classes))
    with pytest.raises(ValueError, match=f"class_labels must be {words}"):
        denoiser(normal(2, 3, 8, 8), torch.ones(2), class_labels=labels)


class Discrete(nn.Module):
    """As k-diffusion wraps an epsilon-network of beta schedules."""

    def __init__(self, inner_model, sigmas):
        super().__init__()
        self.inner_model = inner_model
        self.register_buffer("sigmas", sigmas)

    def sigma_to_t(self, sigma):
        return (sigma[:, None] > self.sigmas).sum(1)

    def forward(self, x, sigma, **extra):
        scale = sigma.view(-1, 1, 1, 1)
        return x - scale * self.inner_model(x / (scale**2 + 1).sqrt(), self.sigma_to_t(sigma))


def test_a_k_diffusion_denoiser():
    """In the variance-exploding form it samples what the epsilon-network does in its own."""
    schedule = fastdiff.NoiseSchedule.linear_beta()
    t = torch.arange(1000, dtype=torch.float64)
    sigmas = torch.exp(-schedule.logsnr(t) / 2).float()
    mix = 0.3 * normal(3, 3)
    network = lambda x, t: torch.einsum("ij,bjhw->bihw", mix, x)
    denoiser = fastdiff.wrap(Discrete(network, sigmas))
    assert isinstance(denoiser, KDiffusionDenoiser) and denoiser.prediction.name == "sample"
    assert denoiser.schedule.first == pytest.approx(float(sigmas[-1]))
    nodes = [999.0, 700.0, 300.0, 50.0, 0.0]
    levels = [float(sigmas[int(t)]) for t in nodes]
    noise = normal(2, 3, 8, 8)
    found = fastdiff.Sampler(denoiser, solver="ddim", spacing=levels)(noise)
    preserving = fastdiff.Sampler(network, schedule, solver="ddim", spacing=nodes)
    start = noise * levels[0] / math.sqrt(1 + levels[0] ** 2)  # the same state in its form
    wanted = preserving(start) / schedule.alpha(0.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_k_diffusion_denoiser_without_levels_needs_a_schedule():
    continuous = nn.Module()
    continuous.inner_model, continuous.get_scalings = nn.Linear(1, 1), lambda sigma: None
    denoiser = fastdiff.wrap(continuous)
    with pytest.raises(ValueError, match="schedule must be given"):
        fastdiff.Sampler(denoiser, steps=5)


# == Anything else =================================================================================


@pytest.mark.parametrize(
    "pack",
    [lambda y: y, lambda y: (y, 1), lambda y: {"sample": y}, lambda y: SimpleNamespace(sample=y)],
)
def test_outputs_are_unpacked(pack):
    denoiser = fastdiff.wrap(lambda x, t: pack(x + t), prediction="sample")
    assert torch.equal(denoiser(torch.zeros(1), torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("output", [None, (), {"other": 1}, SimpleNamespace(sample="text")])
def test_an_output_without_a_tensor_is_named(output):
    with pytest.raises(TypeError, match=f"network must return.*got {type(output).__name__}"):
        unpacked(output)


def test_a_network_of_no_known_family_states_its_prediction():
    with pytest.raises(ValueError, match="prediction must be given for Linear"):
        fastdiff.wrap(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="prediction must be one of"):
        fastdiff.wrap(nn.Linear(1, 1), prediction="noise")
    with pytest.raises(TypeError, match="network must be callable; got int"):
        fastdiff.wrap(3)
    with pytest.raises(TypeError, match="wrapped already"):
        fastdiff.wrap(fastdiff.wrap(nn.Linear(1, 1), prediction="sample"))
    with pytest.raises(TypeError, match="schedule must be.*got int"):
        fastdiff.wrap(nn.Linear(1, 1), prediction="sample", schedule=3)


def test_the_sampler_takes_what_the_wrapped_network_says():
    schedule = fastdiff.NoiseSchedule.cosine()
    network = lambda x, t: 0.5 * x
    denoiser = fastdiff.wrap(network, prediction="v_prediction", schedule=schedule)
    sampler = fastdiff.Sampler(denoiser, steps=4)
    assert sampler.tableau.prediction == "v_prediction"
    plain = fastdiff.Sampler(network, schedule, steps=4, prediction="v_prediction")
    noise = normal(1, 2, 4, 4)
    assert torch.equal(sampler(noise), plain(noise))
    # Said twice is fine; said otherwise is not.
    fastdiff.Sampler(denoiser, schedule, steps=4, prediction="v_prediction")
    with pytest.raises(ValueError, match="must be 'v_prediction', the wrapped.*got 'epsilon'"):
        fastdiff.Sampler(denoiser, steps=4, prediction="epsilon")
    with pytest.raises(ValueError, match="schedule must be left out.*cosine"):
        fastdiff.Sampler(denoiser, fastdiff.NoiseSchedule.linear_beta(), steps=4)
    with pytest.raises(ValueError, match="prediction must be 'v_prediction'"):
        tableau = fastdiff.build_tableau("ddim", schedule, 4, prediction="sample")
        fastdiff.Sampler(denoiser, tableau=tableau)


def test_a_scheduler_brings_the_prediction():
    make = diffusers.DDIMScheduler
    assert (
        fastdiff.wrap(unet(), schedule=make(prediction_type="sample")).prediction.name == "sample"
    )
    with pytest.raises(ValueError, match="prediction must be 'v_prediction'.*got 'epsilon'"):
        fastdiff.wrap(
            unet(), prediction="epsilon", schedule=make(prediction_type="v_prediction").config
        )
    with pytest.raises(ValueError, match="EDMEulerScheduler.*preconditions"):
        fastdiff.wrap(unet(), schedule=diffusers.EDMEulerScheduler())


def test_what_a_unet_needs_is_named():
    with pytest.raises(ValueError, match=r"noise must be \[B, 3, H, W\].*got \(1, 4, 8, 8\)"):
        fastdiff.wrap(unet())(normal(1, 4, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match="encoder_hidden_states must be given.*no conditioning"):
        fastdiff.wrap(text_unet())(normal(1, 4, 8, 8), torch.ones(1))
