"""k-diffusion's sampler functions on the committed digits model, a row of images for each.

python examples/k_diffusion_samplers.py --steps 8
"""

import argparse
from pathlib import Path

import torch

import fastdiff
from fastdiff.images import to_bytes, write_png
from fastdiff.integrations import k_diffusion
from fastdiff.models import load_digits

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", type=Path, default=Path("out/k_diffusion.png"))
options = parser.parse_args()

network, _ = load_digits()
schedule = fastdiff.NoiseSchedule.linear_beta()


def model(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The denoised image, as k-diffusion asks for it: x = x0 + sigma noise."""
    s = sigma.view(-1, 1, 1, 1)
    epsilon = network(x / (1 + s**2).sqrt(), schedule.time(-2 * sigma.log()), labels)
    return x - s * epsilon


high, low = (float(schedule.sigma(t) / schedule.alpha(t)) for t in (999, 0))
root = torch.linspace(high ** (1 / 7), low ** (1 / 7), options.steps)
sigmas = torch.cat([root**7, torch.zeros(1)])
labels = torch.arange(10)
noise = sigmas[0] * fastdiff.seeded_noise(torch.arange(10), (10, 1, 8, 8))

rows = []
for name in ("euler", "ipndm", "dpmpp_2m", "heun"):
    function = getattr(k_diffusion, f"sample_{name}")
    with torch.no_grad():
        images = function(model, noise, sigmas, extra_args={"labels": labels}, disable=True)
    rows.append(torch.cat(list(to_bytes(images)), dim=-1))
    print(f"{name}: {options.steps} steps")
options.out.parent.mkdir(parents=True, exist_ok=True)
picture = torch.cat(rows, dim=-2).repeat_interleave(6, -1).repeat_interleave(6, -2)
write_png(options.out, picture)
print(f"wrote {options.out}")
