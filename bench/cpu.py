"""`python -m bench cpu`: the fused step against diffusers' steps, torch.compile and a copy.

All variants take turns over rotating buffers; ratios are of medians of one run. The fused calls
find their coefficient row ready, as in a prepared sampler; diffusers' steps compute theirs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import PNDMScheduler, UniPCMultistepScheduler
from torch import Tensor

from fastdiff import _ext
from fastdiff.ops import multistep_step, multistep_step_unchecked

from . import timing
from .step import ROWS, arguments, gate, moved_bytes

SIZES = [(1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256)]
FOOTPRINT = 600 << 20  # bytes that one round of buffers spans, beyond any cache
ADAMS_BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)


class Stepper:
    """A diffusers scheduler in its steady state: each call is one `step`."""

    def __init__(self, scheduler: object, outputs: list[Tensor], sample: Tensor) -> None:
        scheduler.set_timesteps(1000)  # far more steps than calls
        self.scheduler, self.outputs, self.sample = scheduler, outputs, sample
        self.timesteps = iter(scheduler.timesteps)
        for number in range(8):
            self(number)

    def __call__(self, number: int) -> None:
        output = self.outputs[number % len(self.outputs)]
        timestep = next(self.timesteps)
        self.sample = self.scheduler.step(output, timestep, self.sample).prev_sample


def pndm() -> PNDMScheduler:
    return PNDMScheduler(skip_prk_steps=True)


def plms_row(scheduler: PNDMScheduler, timestep: int, step: int) -> Tensor:
    """The row of x' = alpha'/alpha x + (sigma' - sigma alpha'/alpha) AB4(F, past); F is kept."""
    before, after = scheduler.alphas_cumprod[[timestep, timestep - step]].double()
    ratio = (after / before).sqrt()
    newest, *past = (
        weight * ((1 - after).sqrt() - (1 - before).sqrt() * ratio) for weight in ADAMS_BASHFORTH
    )
    write_state = [0, newest, 0, ratio, *past]
    write_output = [0, 1, 0, 0, 0, 0, 0]
    row = [0, 0, -torch.inf, torch.inf, 1, *write_state, *write_output]
    return torch.tensor([row], dtype=torch.float32)


def plms_gate() -> dict[str, object]:
    """One fused launch reproduces `PNDMScheduler.step` in its steady state."""
    scheduler = pndm()
    scheduler.set_timesteps(50)
    sample = torch.randn(2, 3, 16, 16)
    for timestep in scheduler.timesteps[:10]:
        before, output = sample, torch.randn_like(sample)
        sample = scheduler.step(output, timestep, before).prev_sample
    step = list(arguments(ROWS["f_pndm"], tuple(sample.shape), torch.device("cpu")))
    step[0][:4] = torch.stack([before, *scheduler.ets[-2:-5:-1]])
    step[1], step[2] = output, plms_row(scheduler, int(timestep), 20)
    multistep_step_unchecked(*step)
    error = (step[0][4] - sample).abs().max().item() / sample.abs().max().item()
    return {"error": error, "allowed": 1e-5, "ok": error <= 1e-5}


@torch.compile
def compiled_plms(
    states: Tensor, output: Tensor, row: Tensor, new_state: Tensor, new_output: Tensor
) -> None:
    """The arithmetic of the PLMS row, for Inductor to fuse."""
    x = row[8] * states[0] + row[9] * states[1] + row[10] * states[2] + row[11] * states[3]
    new_state.copy_(x + row[6] * output)
    new_output.copy_(output)


def measure(shape: tuple[int, ...], threads: int, rounds: int) -> dict[str, object]:
    """All variants at one size and number of threads."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    sets = max(1, min(16, FOOTPRINT // (8 * 4 * torch.Size(shape).numel())))
    steps = {
        name: [arguments(row, shape, cpu, seed=i) for i in range(sets)]
        for name, row in ROWS.items()
    }
    moved = {name: moved_bytes(row, steps[name][0]) for name, row in ROWS.items()}
    pairs = [torch.randn(2, moved["f_pndm"] // 8).unbind() for _ in range(sets)]
    outputs = [step[1] for step in steps["f_pndm"]]
    noise = torch.empty(shape)

    def compiled(i: int) -> None:
        slots, output, row = steps["f_pndm"][i][:3]
        compiled_plms(slots[:4], output, row[0], slots[4], slots[5])

    variants: timing.Variants = {
        f"fused {name}": lambda i, calls=calls: multistep_step_unchecked(*calls[i])
        for name, calls in steps.items()
    }
    variants |= {
        "diffusers PNDM": Stepper(pndm(), outputs, torch.randn(shape)),
        "diffusers UniPC": Stepper(UniPCMultistepScheduler(), outputs, torch.randn(shape)),
        "torch copy_": lambda i: pairs[i][0].copy_(pairs[i][1]),
        "torch.randn": lambda i: noise.normal_(),
    }
    taken = timing.interleaved(variants, sets, rounds)
    # On its own: compiled code brings a second pool of spinning threads.
    beside = {"fused f_pndm": variants["fused f_pndm"], "torch.compile f_pndm": compiled}
    compiled_taken = timing.interleaved(beside, sets, rounds)
    p50 = {name: quantities["p50_us"] for name, quantities in taken.items()}
    # Both are copies; the fused one stores past the cache.
    copy = max(moved["f_pndm"] / p50["torch copy_"], moved["copy"] / p50["fused copy"])
    return {
        "shape": shape,
        "threads": threads,
        "buffers": sets,
        "bytes": moved,
        "times": taken,
        "copy_gbytes_per_s": copy / 1e3,
        "of_copy_bandwidth": {
            f"fused {name}": moved[name] / p50[f"fused {name}"] / copy for name in ROWS
        },
        "diffusers_pndm_over_fused": p50["diffusers PNDM"] / p50["fused f_pndm"],
        "diffusers_unipc_over_fused": p50["diffusers UniPC"] / p50["fused unipc"],
        "times_beside_compiled": compiled_taken,
        "compiled_over_fused": compiled_taken["torch.compile f_pndm"]["p50_us"]
        / compiled_taken["fused f_pndm"]["p50_us"],
    }


def call_to_return(threads: int) -> dict[str, object]:
    """1000 calls in a row of one small image."""
    torch.set_num_threads(threads)
    record: dict[str, object] = {"shape": SIZES[0], "threads": threads}
    for name in ("f_pndm", "ddim seeded"):
        slots, output, coefficients, index, _, seeds, *_ = step = arguments(
            ROWS[name], SIZES[0], torch.device("cpu")
        )
        calls: timing.Variants = {
            "unchecked": lambda _, step=step: multistep_step_unchecked(*step),
            "checked": lambda _, a=(slots, output, coefficients, index), seeds=seeds, step=step: (
                multistep_step(*a, seeds=seeds, reads=step[8], writes=step[9])
            ),
        }
        record[name] = {k: timing.interleaved({k: v}, 1, 1000)[k] for k, v in calls.items()}
    return record


@torch.inference_mode()
def main(path: Path | None) -> int:
    record: dict[str, object] = {"bench": "cpu", **timing.machine(torch.device("cpu"))}
    if record["load_average_before"] > 0.5:
        print(
            f"the machine is busy, load average {record['load_average_before']:.1f}: mistrust times"
        )
    record["extension"] = _ext.build_info() or _ext.reason
    record["gates"] = {"plms against diffusers": plms_gate()}
    for name, row in ROWS.items():
        record["gates"][name] = gate(arguments(row, (2, 3, 31, 33), torch.device("cpu")))
    wrong = {name: g for name, g in record["gates"].items() if not g["ok"]}
    if wrong:
        print(f"no times, these rows are wrong: {wrong}")
        return 1

    record["call_to_return"] = [call_to_return(threads) for threads in (1, 2)]
    for r in record["call_to_return"]:
        small = {name: r[name]["unchecked"]["p50_us"] for name in ("f_pndm", "ddim seeded")}
        print(f"{r['threads']} threads, 1x3x32x32, call to return, p50 of 1000: "
              + ", ".join(f"{name} {value:.1f} us" for name, value in small.items()))  # fmt: skip
    record["sizes"] = []
    for threads in (1, 2):
        for shape in SIZES:
            size = measure(shape, threads, 20 if shape == SIZES[-1] else 200)
            record["sizes"].append(size)
            print(f"\n{'x'.join(map(str, shape))} float32, {threads} threads, "
                  f"copy {size['copy_gbytes_per_s']:.1f} GB/s")  # fmt: skip
            for name, taken in size["times"].items():
                share = size["of_copy_bandwidth"].get(name)
                of_copy = f", {share:4.0%} of copy" if share else ""
                print(f"  {name:28} p50 {taken['p50_us']:10.1f} us{of_copy}")
            print(f"  over fused: diffusers PNDM {size['diffusers_pndm_over_fused']:.1f}x, UniPC "
                  f"{size['diffusers_unipc_over_fused']:.1f}x, torch.compile "
                  f"{size['compiled_over_fused']:.2f}x")  # fmt: skip
    path = path or timing.result_path(record["cpu"])
    timing.write_json(record, path)
    print(f"\nwrote {path}")
    return 0
