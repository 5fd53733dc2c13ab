# The two commands: `make demo` and `make test`.  Both set up what they need first and are quick the second time.
# `make test-sglang` does the same with SGLang, in an environment of its own.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where pip finds the CPU build of torch.  On an index that serves CUDA builds by default (PyPI on Linux):
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
EXTRAS ?= dev

# SGLang pins another torch than ours, so its environment is apart.  What pip fetches for it (1.5 GB) outlives the
# checkout, in a folder named after all that it depends on.  Another release of SGLang goes before it, so that
#   make test-sglang SGLANG_VERSION=0.5.21
# tells whether the plugin works in that one.
SGLANG_VERSION ?=
SGLANG_VENV  ?= .venv-sglang$(addprefix -,$(SGLANG_VERSION))
SGLANG_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/livedraft
SGLANG_KEY   := $(shell { $(PYTHON) -VV; echo "$(TORCH_INDEX)"; cat tests/sglang/requirements.txt; } | sha256sum | cut -c-16)
SGLANG_PACKAGES := $(SGLANG_CACHE)/sglang-$(SGLANG_KEY)

.PHONY: setup setup-sglang demo test test-kernels test-sglang bench-sglang bench-sglang-gpu lint clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready  ## make the environment

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

setup-sglang: $(SGLANG_VENV)/.ready-$(SGLANG_KEY)  ## make the environment with SGLang in it

# Packages are put in place whole, since another checkout may be doing the same.
$(SGLANG_VENV)/.ready-$(SGLANG_KEY): pyproject.toml
	rm -f $(SGLANG_VENV)/.ready-*
	$(PYTHON) -m venv $(SGLANG_VENV)
	test -d $(SGLANG_PACKAGES) || ( \
	  mkdir -p $(SGLANG_CACHE) && new=$$(mktemp -d -p $(SGLANG_CACHE)) && trap "rm -rf $$new" EXIT && \
	  $(SGLANG_VENV)/bin/pip install --quiet --target $$new torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) && \
	  $(SGLANG_VENV)/bin/pip install --quiet --target $$new --upgrade --no-deps --requirement tests/sglang/requirements.txt && \
	  { mv -T $$new $(SGLANG_PACKAGES) || test -d $(SGLANG_PACKAGES); } )
	echo $(SGLANG_PACKAGES) > $$($(SGLANG_VENV)/bin/python -c "import site; print(*site.getsitepackages())")/sglang.pth
	$(SGLANG_VENV)/bin/pip install --quiet --no-deps --editable . $(addprefix sglang==,$(SGLANG_VERSION))
	touch $@

demo: setup  ## watch a drafter learn from live traffic (about 10 minutes)
	$(BIN)/livedraft demo

test: setup  ## run the tests
	$(BIN)/python -m pytest

test-kernels: setup  ## run the GPU kernels' tests, on a CPU by Triton's interpreter (fetches 290 MB once)
	$(BIN)/pip install --quiet --editable ".[kernels]"
	$(BIN)/python -m pytest tests/kernels_triton

# The loop around SGLang runs in the project's own environment.
test-sglang: setup setup-sglang  ## run the tests against SGLang, or another one: SGLANG_VERSION=0.5.21
	LIVEDRAFT_PYTHON=$(abspath $(BIN))/python PYTHONPATH=$(CURDIR)/tests/sglang/shim$${PYTHONPATH:+:$$PYTHONPATH} $(SGLANG_VENV)/bin/python -m pytest --timeout=600 tests/sglang

bench-sglang: setup setup-sglang  ## measure capture, swaps and learning on SGLang into runs/bench/sglang.json (20 minutes)
	LIVEDRAFT_PYTHON=$(abspath $(BIN))/python PYTHONPATH=$(CURDIR)/tests/sglang/shim$${PYTHONPATH:+:$$PYTHONPATH} $(SGLANG_VENV)/bin/python -m tests.sglang.bench

# In an environment that somebody made: SGLang with its CUDA kernels, and `pip install --editable ".[sglang]"`.
SGLANG_GPU_PYTHON ?= python3
bench-sglang-gpu:  ## the same without the loop, on a GPU, by SGLANG_GPU_PYTHON; for a real model BENCH="--target ID --drafter FOLDER"
	$(SGLANG_GPU_PYTHON) -m tests.sglang.bench --device cuda --out runs/bench/sglang-gpu.json $(BENCH)

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy --strict $(addprefix -p livedraft.,contracts kernels serving.gateway serving.local serving.sglang swap traces trainer cli benchmarks) && $(BIN)/mypy --strict tests

clean:  ## remove the environments and everything a run wrote
	rm -rf $(VENV) $(SGLANG_VENV) $(wildcard .venv-sglang-*) runs build dist *.egg-info
