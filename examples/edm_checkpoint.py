"""An EDM checkpoint, with its own repository on the path, sampled by iPNDM in 10 calls.

    python examples/edm_checkpoint.py --repository EDM_CHECKOUT --network FILE.pkl
    python examples/edm_checkpoint.py --fake

The pickle holds its network's code and needs the repository's modules; load only files you trust.
"""

import argparse
import math
import pickle
import sys
from pathlib import Path

import torch
from torch import nn

import fastdiff
from fastdiff.images import to_bytes, write_png


class GaussianDenoiser(nn.Module):
    """EDM's interface around the exact denoiser of a normal distribution of images."""

    sigma_min, sigma_max, sigma_data = 0.0, math.inf, 0.5
    img_channels, img_resolution, label_dim = 3, 16, 0

    def __init__(self) -> None:
        super().__init__()
        ramp = torch.linspace(-0.8, 0.8, self.img_resolution)
        self.mean = nn.Parameter(torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16),
                                              torch.zeros(16, 16)]))  # fmt: skip

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(sigma)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels=None) -> torch.Tensor:
        noise, data = sigma.reshape(-1, 1, 1, 1) ** 2, 0.1**2
        return (data * x + noise * self.mean) / (data + noise)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--repository", type=Path, help="a checkout of the code that made the file")
parser.add_argument("--network", type=Path, help="the pickle")
parser.add_argument("--fake", action="store_true", help="an exact denoiser in its place")
parser.add_argument("--label", type=int, help="a class, for conditional networks")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", type=Path, default=Path("out/edm.png"))
options = parser.parse_args()

if options.fake:
    network = GaussianDenoiser()
elif options.repository and options.network:
    sys.path.insert(0, str(options.repository))
    with options.network.open("rb") as file:
        network = pickle.load(file)["ema"].eval()
else:
    parser.error("give --repository and --network, or --fake")

# The network says that it predicts x0 and which sigmas it knows; the grid is the paper's (rho 7).
sampler = fastdiff.accelerate(network, solver="ipndm", steps=options.steps)
conditioning = {}
if options.label is not None:
    labels = torch.full((4,), options.label)
    conditioning["class_labels"] = nn.functional.one_hot(labels, network.label_dim).float()
shape = (network.img_channels, network.img_resolution, network.img_resolution)
images = sampler(seeds=range(4), shape=shape, **conditioning)
print(sampler)
options.out.parent.mkdir(parents=True, exist_ok=True)
write_png(options.out, torch.cat(list(to_bytes(images)), dim=-1))
print(f"wrote {options.out}")
