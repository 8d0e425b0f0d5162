"""A flow-matching transformer of diffusers, sampled by a multistep solver.

    python examples/flow_matching.py FOLDER --embeddings FILE.pt     # Stable Diffusion 3's folder
    python examples/flow_matching.py --fake

FILE.pt holds a dictionary with the text encoders' encoder_hidden_states [B, L, D] and
pooled_projections [B, P]. The result is latents [B, C, h, w]; the folder's VAE decodes them.
"""

import argparse
from pathlib import Path

import diffusers
import torch

import fastdiff

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", nargs="?", type=Path, help="with transformer/ and scheduler/")
parser.add_argument("--embeddings", type=Path)
parser.add_argument("--fake", action="store_true", help="a small untrained transformer")
parser.add_argument("--solver", default="dpmpp_2m")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--out", type=Path, default=Path("out/latents.pt"))
options = parser.parse_args()

if options.fake:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=16,
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    embeddings = {
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 16),
    }
elif options.folder and options.embeddings:
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(options.folder / "transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        options.folder / "scheduler"
    )
    embeddings = torch.load(options.embeddings, weights_only=True)
else:
    parser.error("give a FOLDER and --embeddings, or --fake")

sampler = fastdiff.accelerate(transformer, scheduler, solver=options.solver, steps=options.steps)
size, batch = transformer.config.sample_size, len(embeddings["pooled_projections"])
latents = sampler(
    seeds=range(batch), shape=(transformer.config.in_channels, size, size), **embeddings
)
print(sampler)
options.out.parent.mkdir(parents=True, exist_ok=True)
torch.save(latents, options.out)
print(f"wrote {options.out}, {tuple(latents.shape)}")
