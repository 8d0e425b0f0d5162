"""What is installed, from where it imports, and what the built extension may depend on."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastdiff import _ext

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fastdiff", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")

needs_ext = pytest.mark.skipif(not _ext.HAS_EXT, reason="needs the C++ extension")

USE = """
import importlib, os, torch
import fastdiff, fastdiff.ops, fastdiff._ext
kernels = importlib.import_module("fastdiff.kernels.multistep_step")
noise = fastdiff.ops.seeded_noise([1, 2], (2, 3, 4, 4))
assert noise.isfinite().all()
print(fastdiff.__file__, kernels.__file__, fastdiff._ext.HAS_EXT, sep="\\n")
"""


def python(*arguments, cwd, executable=sys.executable, **environment):
    """Run Python in a folder, without this process's import path; (exit status, output)."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTDIFF_CUDA")}
    env |= {"MAX_JOBS": "1", **environment}
    run = subprocess.run(
        [str(executable), *map(str, arguments)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.returncode, run.stdout


def checked(*arguments, **options):
    status, output = python(*arguments, **options)
    assert status == 0, output
    return output


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, as a fresh clone holds them."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture
def environment(tmp_path):
    """A fresh environment's Python; it sees this one's packages, but not this one's fastdiff."""
    folder = tmp_path / "env"
    checked("-m", "venv", "--without-pip", folder, cwd=tmp_path)
    executable = folder / "bin" / "python"
    purelib = checked(
        "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
        cwd=tmp_path, executable=executable,
    ).strip()  # fmt: skip
    # Paths named by a .pth file are searched, but their own .pth files (our editable install) not.
    (Path(purelib) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return executable


def pip_install(executable, *arguments, cwd, **environment):
    return checked(
        "-m", "pip", "--python", executable, "install", "--no-build-isolation", "--no-deps",
        "--no-index", *arguments, cwd=cwd, **environment,
    )  # fmt: skip


def imported_from(executable, cwd):
    """(fastdiff's file, a kernel's file, whether the extension is there) as seen from a folder."""
    output = checked("-c", USE, cwd=cwd, executable=executable)
    package, kernel, has_ext = output.strip().splitlines()[-3:]
    return Path(package), Path(kernel), has_ext == "True"


def test_the_import_is_lean():
    program = """
import sys, torch
before = set(sys.modules)
import fastdiff
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "diffusers", "matplotlib", "sklearn", "scipy", "typer", "rich", "safetensors"}
assert not new & heavy, new & heavy
assert "torch._dynamo" not in set(sys.modules) - before
assert not torch.cuda.is_initialized()
"""
    assert checked("-c", program, cwd=ROOT) == ""  # nothing is printed either


@pytest.mark.parametrize("cwd", [ROOT, Path("/")])
def test_hugging_face_kernels_stays_importable(cwd):
    pytest.importorskip("kernels")
    program = (
        "from kernels import get_kernel; import fastdiff.kernels.multistep_step as k; print(k)"
    )
    assert str(ROOT / "kernels" / "multistep_step.py") in checked("-c", program, cwd=cwd)
    assert not (ROOT / "kernels" / "__init__.py").exists()


@needs_ext
def test_extension_needs_only_torchs_stable_symbols():
    """Nothing of at::, c10:: or torch::, whose ABI changes with every release; only the C shim."""
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    run = subprocess.run(["nm", "-u", _ext._C.__file__], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in run.stdout.splitlines()}
    assert not [n for n in names if re.match(r"_Z\w*?(2at|3c10|5torch)\d", n)]
    allowed = set((ROOT / "tests" / "torch_symbols.txt").read_text().split())
    assert {n for n in names if re.match(r"(aoti|torch)_", n)} <= allowed


@needs_ext
def test_wide_instructions_only_behind_the_run_time_check():
    """A wheel runs on any machine of its architecture: AVX only in the avx2 and avx512 kernels."""
    if not shutil.which("objdump") or _ext.build_info()["cpu_target"] == "baseline":
        pytest.skip("needs objdump (binutils) and a machine with AVX2")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _ext._C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide, function = set(), ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif re.search(r"%[yz]mm|\tv[a-z0-9]+ .*%xmm", line):
            wide.add(function)
    assert wide
    assert not [f for f in wide if not re.search(r"fastdiff::cpu::avx(2|512)::", f)]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("1", "FASTDIFF_CUDA=1 needs nvcc: install the CUDA toolkit"),
        ("yes", "FASTDIFF_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_cuda_wishes_that_cannot_be_met(checkout, wish, message):
    status, output = python(
        "setup.py", "--version", cwd=checkout, FASTDIFF_CUDA=wish, CUDA_HOME="/nowhere"
    )
    assert status != 0 and "Traceback" not in output
    assert message in output


def test_without_torch(checkout):
    """The sdist can be made; compiling ends in one sentence that names the flag."""
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', *sys.argv[1:]]; "
        "exec(open('setup.py').read())"
    )
    checked("-c", program, "-q", "sdist", cwd=checkout)
    with tarfile.open(next((checkout / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = [f"csrc/{name}" for name in ("ops.cpp", "philox.h", "cpu/multistep_step.cpp")]
    expected += ["kernels/multistep_step.py", "fastdiff/ops/multistep_step.py", "setup.py"]
    assert held >= set(expected)
    status, output = python("-c", program, "-q", "build_ext", cwd=checkout)
    assert status != 0 and "Traceback" not in output
    assert "pip install --no-build-isolation" in output


@pytest.mark.parametrize(
    ("toolkit", "wish", "says"),
    [("12.4", "auto", "no CUDA kernels: nvcc in"),
     ("13.1", "auto", "sources ['csrc/cuda/haar.cu', "),
     ("12.4", "1", "sources ['csrc/cuda/haar.cu', "), ("13.1", "0", "sources []")],
)  # fmt: skip
def test_the_toolkit_is_that_of_torch(checkout, tmp_path, toolkit, wish, says):
    """An nvcc of another major version than torch's is passed over, unless it is asked for."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {toolkit}, V{toolkit}.99'\n")
    nvcc.chmod(0o755)
    program = (
        "import sys, types; source = open('setup.py').read(); "
        "names = {}; exec(source[: source.index('ext_modules, cmdclass')], names); "
        "torch = types.SimpleNamespace(version=types.SimpleNamespace(cuda='13.0')); "
        f"home = types.SimpleNamespace(CUDA_HOME={str(tmp_path)!r}); "
        "print('sources', names['cuda_sources'](torch, home))"
    )
    status, output = python("-c", program, cwd=checkout, FASTDIFF_CUDA=wish)
    assert status == 0 and says in output, output


@pytest.mark.parametrize("given", [None, "/given"])
def test_an_nvcc_that_is_a_script_says_where_its_toolkit_is(checkout, tmp_path, given):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho '#$ _HERE_=/a' >&2\necho '#$ TOP=/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    program = (
        "import os; source = open('setup.py').read(); names = {}; "
        "exec(source[: source.index('ext_modules, cmdclass')], names); "
        "names['find_toolkit'](); print('home', os.environ['CUDA_HOME'])"
    )
    path = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    wish = {"CUDA_HOME": given or "", "CUDA_PATH": "", "PATH": path}
    status, output = python("-c", program, cwd=checkout, **wish)
    assert status == 0 and f"home {given or '/toolkit'}" in output, output


def test_pure_python_wheel(checkout, environment, tmp_path):
    checked("setup.py", "-q", "bdist_wheel", cwd=checkout, FASTDIFF_EXT="0")
    wheel = next((checkout / "dist").glob("fastdiff_sampling-*-py3-none-any.whl"))
    held = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in held}
    assert tops == {"fastdiff", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert {"fastdiff/kernels/multistep_step.py", "fastdiff/py.typed"} <= set(held)
    assets = {p.relative_to(ROOT) for p in (ROOT / "fastdiff" / "assets").rglob("*.safetensors")}
    assert {str(path) for path in assets} <= set(held)

    pip_install(environment, wheel, cwd=tmp_path)
    package, kernel, has_ext = imported_from(environment, tmp_path)
    assert not has_ext
    assert kernel == package.parent / "kernels" / "multistep_step.py"
    # In the checkout the sources win, kernels included.
    assert imported_from(environment, checkout) == (
        checkout / "fastdiff" / "__init__.py",
        checkout / "kernels" / "multistep_step.py",
        False,
    )


@pytest.mark.slow
def test_sdist_builds_the_extension(checkout, environment, tmp_path):
    checked("setup.py", "-q", "sdist", cwd=checkout)
    sdist = next((checkout / "dist").glob("*.tar.gz"))
    output = pip_install(environment, "-v", sdist, cwd=tmp_path)
    summary = output[output.index("fastdiff extension:") :].splitlines()[:3]
    assert "ABI target 2.11" in summary[1] and "CUDA C++: none" in summary[2]
    package, kernel, has_ext = imported_from(environment, tmp_path)
    assert has_ext
    assert kernel == package.parent / "kernels" / "multistep_step.py"
    assert not (package.parent / "csrc").exists()


@pytest.mark.slow
def test_editable_builds_the_extension(checkout, environment, tmp_path):
    pip_install(environment, "-e", checkout, cwd=tmp_path)
    for cwd in (tmp_path, checkout):
        package, kernel, has_ext = imported_from(environment, cwd)
        assert has_ext and package == checkout / "fastdiff" / "__init__.py"
        assert kernel == checkout / "kernels" / "multistep_step.py"
    (checkout / "kernels" / "added_later.py").write_text("value = 1\n")
    checked("-c", "import fastdiff.kernels.added_later", cwd=tmp_path, executable=environment)
