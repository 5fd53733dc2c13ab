# The two commands: `make demo` and `make test`.  Both set up what they need first and are quick the second time.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where pip finds the CPU build of torch.  On an index that serves CUDA builds by default (PyPI on Linux):
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
EXTRAS ?= dev

.PHONY: setup demo test lint clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready  ## make the environment

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

demo: setup  ## watch a drafter learn from live traffic (about 10 minutes)
	$(BIN)/livedraft demo

test: setup  ## run the tests
	$(BIN)/python -m pytest

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.typing $(BIN)/mypy --strict $(addprefix -p livedraft.,contracts kernels serving.gateway serving.local serving.sglang swap traces trainer cli benchmarks) && $(BIN)/mypy --strict tests

clean:  ## remove the environment and everything a run wrote
	rm -rf $(VENV) runs build dist *.egg-info
