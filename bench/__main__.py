"""The command line of the benchmarks."""

import argparse
import sys
from pathlib import Path

parser = argparse.ArgumentParser(prog="python -m bench", description="Correctness, then times.")
commands = parser.add_subparsers(dest="command", required=True)
gpu = commands.add_parser("gpu", help="every kernel on this machine's GPU")
gpu.add_argument("--dry", action="store_true", help="walk the same path on the CPU, small sizes")
cpu = commands.add_parser("cpu", help="the fused step against diffusers, torch.compile and a copy")
for command in (gpu, cpu):
    command.add_argument("--json", type=Path, help="the record's file, instead of bench/results/")


def main() -> int:
    options = parser.parse_args()
    if options.command == "gpu":
        from .gpu import main

        return main(options.dry, options.json)
    from .cpu import main

    return main(options.json)


if __name__ == "__main__":
    sys.exit(main())
