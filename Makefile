# Every target does its own set-up: a machine with Python >= 3.10, make and a C++ compiler is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without bytecode of every module, which takes a minute: Python makes that of what it imports.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-slow lint bench cuda-check ptx-check rehearsal gpu-visit clean

demo: $(VENV)/.built  ## sample real digits with every solver, live; pictures go to out/
	$(BIN)/fastdiff demo

test: $(VENV)/.tests  ## the test suite, under 10 minutes on two cores
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: $(VENV)/.tests  ## the longer proofs
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.tests  ## this machine's numbers, as ratios within one run
	$(BIN)/python -m bench

ARCHS ?= 80 90 100
cuda-check: $(VENV)/.cuda  ## compile every kernel for sm_80, sm_90 and sm_100; no GPU needed
	$(BIN)/python -m bench.aot --archs $(ARCHS)

ptx-check: $(VENV)/.tests  ## the Triton kernels' GPU tests on their machine code; no GPU needed
	$(BIN)/python -m bench.ptx

rehearsal: $(VENV)/.tests  ## the schedule of a visit to a GPU, with scripted processes
	$(BIN)/python -m bench gpu --rehearse 20

# What the machine to be visited has; its Python's minor version is that of the extension.
GPU_PYTHON ?= python3.12
GPU_VENV := .venv-gpu
GPU_HAS := torch==2.11.0 triton==3.6.0 'numpy<2.4' setuptools wheel ninja pybind11 pytest \
	pytest-benchmark pytest-xdist pytest-timeout hypothesis
GPU_LACKS := diffusers==0.42.1 importlib_metadata==10.2.0 zipp==4.1.2

gpu-visit: $(GPU_VENV)/.ready  ## make .gpu/, what a visit to a GPU brings along; prints the commands
	TORCH_CUDA_ARCH_LIST=9.0 $(GPU_VENV)/bin/python setup.py -q build_ext --inplace
	$(GPU_VENV)/bin/python -m bench warm --cache $(GPU_VENV)/triton --to .gpu/triton-cache.tar.xz
	$(GPU_VENV)/bin/pip download --quiet --no-deps --dest .gpu/wheels $(GPU_LACKS)
	$(GPU_VENV)/bin/python -m bench.visit.brought

$(GPU_VENV)/.ready:
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet $(GPU_HAS) $(GPU_LACKS)
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the extension is compiled against the one that is installed, so pip may not isolate.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch numpy setuptools wheel ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/.tests: $(VENV)/.built
	$(PIP) --no-build-isolation -e '.[demo,test,bench,lint]'
	touch $@

# Without a CUDA toolkit the compiler comes from PyPI.
$(VENV)/.cuda: $(VENV)/.tests
	command -v nvcc >/dev/null || $(PIP) 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' \
		'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.*' 'nvidia-cuda-cccl==13.*'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) .gpu build dist out *.egg-info fastdiff/_C*.so
