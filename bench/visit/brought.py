"""`make gpu-visit`'s last step: is what a visit brings along there, and how is a visit begun?"""

from __future__ import annotations

import subprocess
import sys
import sysconfig

from fastdiff import _ext

from ..files import ROOT
from .child import source_digest
from .command import BROUGHT

COMMANDS = """
Bring along, besides the repository: {files} ({megabytes:.1f} MB). On the machine with the GPU, in
the repository's root, one after the other:

  FASTDIFF_COMMIT={commit} timeout 540 python3 -m bench gpu --budget 515 --out out/visit
  FASTDIFF_COMMIT={commit} timeout 170 python3 -m bench gpu --budget 150 --out out/visit

Then bring back out/visit (docs/gpu-visit.md says how to read it)."""


def main() -> int:
    """0 where all of it is there."""
    extension = f"fastdiff/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    built, digest = _ext.build_info(), source_digest()
    wrong = []
    if not _ext.HAS_CUDA:
        wrong.append(f"{extension} has no CUDA kernels: {_ext.reason or built}")
    elif built["sources"] != digest:
        wrong.append(f"{extension} is of other sources ({built['sources']}, here {digest})")
    cache, wheels = BROUGHT / "triton-cache.tar.xz", list((BROUGHT / "wheels").glob("*.whl"))
    wrong += [] if cache.is_file() else [f"{cache} is not there"]
    wrong += [] if wheels else [f"no wheel in {BROUGHT / 'wheels'}"]
    for complaint in wrong:
        print(complaint)
    if wrong:
        return 1
    size = sum(path.stat().st_size for path in (ROOT / extension, cache, *wheels))
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    print(COMMANDS.format(files=f"{extension} .gpu/triton-cache.tar.xz .gpu/wheels",
                          megabytes=size / 1e6, commit=head.stdout.strip()))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
