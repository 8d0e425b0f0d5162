"""What a visit brings along, besides the repository: the extension, Triton's cache, wheels.

`python -m bench.visit.brought`, the last step of `make gpu-visit`, asks whether it is there, and
prints how a visit is begun; `prepared` unpacks it on the other machine, without torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from ..files import ROOT

BROUGHT = ROOT / ".gpu"  # what `make gpu-visit` made: Triton's cache and wheels
CACHE, SITE = BROUGHT / "triton", BROUGHT / "site"  # where both are unpacked

COMMANDS = """
Bring along, besides the repository: {files} ({megabytes:.1f} MB). On the machine with the GPU, in
the repository's root, one after the other:

  FASTDIFF_COMMIT={commit} timeout 540 python3 -m bench gpu --budget 515 --out out/visit
  FASTDIFF_COMMIT={commit} timeout 170 python3 -m bench gpu --budget 150 --out out/visit

Then bring back out/visit (docs/gpu-visit.md says how to read it)."""


def source_digest() -> str:
    """Of the sources that are here, as setup.py writes it into build_info."""
    return runpy.run_path(str(ROOT / "csrc" / "digest.py"))["digest"](ROOT)


def prepared() -> dict[str, str]:
    """Unpack what was brought along; the environment in which it is found."""
    paths = [str(ROOT), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    packed, wheels = BROUGHT / "triton-cache.tar.xz", sorted((BROUGHT / "wheels").glob("*.whl"))
    if packed.is_file() and not CACHE.exists():
        unpack(packed, CACHE)
    if wheels and not SITE.exists():
        aside = SITE.with_name("site.unpacking")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
             "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(aside),
             *map(str, wheels)],
        )  # fmt: skip
        if done.returncode == 0:
            aside.rename(SITE)
        else:
            print(f"the wheels in {BROUGHT} were not installed: pip ended with {done.returncode}")
    return {"PYTHONPATH": os.pathsep.join(paths), **triton_environment(CACHE)}


def unpack(packed: Path, cache: Path) -> None:
    """Unpack a Triton cache at `cache`, and rewrite the absolute paths in its group files."""
    aside = cache.with_name(
        f"{cache.name}.unpacking"
    )  # A half-unpacked cache must not look complete.
    shutil.rmtree(aside, ignore_errors=True)
    with tarfile.open(packed) as archive:
        archive.extractall(aside, filter="data")
    for group in aside.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        place = cache / group.parent.name
        moved = {file: str(place / Path(path).name) for file, path in paths.items()}
        group.write_text(json.dumps({"child_paths": moved}))
    aside.rename(cache)


def triton_environment(cache: Path) -> dict[str, str]:
    """Triton's cache at that place, and its own ptxas, which torch.compile would exchange."""
    env = {"TRITON_CACHE_DIR": str(cache)}
    found = importlib.util.find_spec("triton")
    for folder in (found and found.submodule_search_locations) or ():
        ptxas = Path(folder) / "backends" / "nvidia" / "bin" / "ptxas"
        if ptxas.is_file():
            env["TRITON_PTXAS_PATH"] = str(ptxas)
    return env


def main() -> int:
    """0 where all of it is there."""
    from fastdiff import _ext

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
