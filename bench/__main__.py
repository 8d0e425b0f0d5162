"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Correctness, then times, of every op and loop. Other commands: python -m "
        "bench gpu, warm or report; each has its own --help.",
    )
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="this entry only (repeatable)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, action="append", help="on the CPU: 1 and all cores")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, minutes")
    parser.add_argument("--json", type=Path, help="the record's file, instead of bench/results/")
    parser.add_argument("--base", metavar="REV", help="compare with the library of that revision")
    return parser


COMMANDS = {"gpu": "visit.command", "report": "report", "warm": "warm"}


def main(given: list[str]) -> int:
    if given and given[0] in COMMANDS:  # the first one imports no torch
        return importlib.import_module(f".{COMMANDS[given[0]]}", __package__).main(given[1:])
    parser = arguments()
    options = parser.parse_args(given)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and PyTorch sees none")
    if options.base:
        from .base import compare

        return compare(options.base, given)
    from .run import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
