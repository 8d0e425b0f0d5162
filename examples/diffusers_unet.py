"""A diffusers UNet and its scheduler, sampled by another solver.

python examples/diffusers_unet.py FOLDER --steps 10      # what save_pretrained wrote
python examples/diffusers_unet.py --fake                 # a small untrained one
"""

import argparse
from pathlib import Path

import torch

import fastdiff
from fastdiff.images import to_bytes, write_png

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", help="of a pipeline with a UNet2DModel")
parser.add_argument("--fake", action="store_true", help="a small untrained UNet in its place")
parser.add_argument("--solver", default="ipndm", help="see `fastdiff solvers`")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", type=Path, default=Path("out/diffusers_unet.png"))
options = parser.parse_args()

if options.fake:
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    # Prediction type, spacing and clipping are the scheduler's.
    sampler = fastdiff.accelerate(
        unet, diffusers.DDPMScheduler(), solver=options.solver, steps=options.steps
    )
elif options.folder:
    sampler = fastdiff.accelerate(options.folder, solver=options.solver, steps=options.steps)
    unet = sampler.denoiser.network
else:
    parser.error("give a FOLDER, or --fake")

size = unet.config.sample_size
images = sampler(seeds=range(4), shape=(unet.config.in_channels, size, size))
print(sampler)
options.out.parent.mkdir(parents=True, exist_ok=True)
write_png(options.out, torch.cat(list(to_bytes(images)), dim=-1))
print(f"wrote {options.out}")
