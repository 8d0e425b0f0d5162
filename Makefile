# Every target does its own set-up: a machine with Python >= 3.10, make and a C++ compiler is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test test-slow lint bench cuda-check clean

demo: $(VENV)/.built  ## sample real digits with every solver, live; pictures go to out/
	$(BIN)/fastdiff demo

test: $(VENV)/.tests  ## the test suite, under 10 minutes on two cores
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.tests  ## the longer proofs
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.tests  ## this machine's numbers, as ratios within one run
	$(BIN)/python -m bench

cuda-check: $(VENV)/.cuda  ## compile every kernel for sm_80, sm_90 and sm_100; no GPU needed
	$(BIN)/python -m bench.aot

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
	rm -rf $(VENV) build dist out *.egg-info fastdiff/_C*.so
