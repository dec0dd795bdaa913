# make demo    first minutes: train, evaluate, export tiny models on two cores, open report.html
# make check   format, lint, types
# make test    the CPU suite
# make test-slow  compiled code, kills, and 20,000 damaged files for all readers
# make docs    the site of the guides, in build/docs/site
# make scripts the benchmark scripts and the demo, in small
# make setup   only install what the demo needs
#
# PYTHON=python3.12            another interpreter, 3.11 or newer
# TORCH_INDEX=URL              another build of torch, chosen when .venv is first made, for example
#                              https://download.pytorch.org/whl/cpu (no CUDA, a tenth of the size)
# DEMO_ARGS="--short"          handed to `internvl demo`

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=

VENV := .venv
PINS := pyproject.toml constraints.txt
# Byte code is made for what `bytecode` imports, not for every file of every library: faster to install.
PIP_INSTALL := $(VENV)/bin/python -m pip install --no-compile --constraint constraints.txt

# torch alone comes from TORCH_INDEX; its own dependencies follow with everything else's.
define install
$(if $(TORCH_INDEX),$(PIP_INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
$(PIP_INSTALL) --editable '.[$(1)]'
endef

# Also where the environment says to write none: compiling transformers anew costs each process 4 s.
define bytecode
PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -c \
  'import internvl.check, internvl.demo, internvl.plan, torch._inductor.compile_fx'
endef

.PHONY: setup demo check test test-slow scripts docs clean

setup: $(VENV)/.demo

demo: setup
	$(VENV)/bin/internvl demo $(DEMO_ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

test: $(VENV)/.dev
	$(VENV)/bin/pytest -q -n 2 --dist worksteal -m "not scripts and not slow and not slow_fuzz"

# Three, for two cores: these tests wait a third of their time, for ranks, servers, browsers and Slurm.
test-slow: $(VENV)/.slow
	$(VENV)/bin/pytest -q -n 3 --dist worksteal -m "(slow or slow_fuzz) and not scripts"

scripts: $(VENV)/.dev
	$(VENV)/bin/pytest -q -n 2 --dist worksteal -m scripts

docs: $(VENV)/.dev
	$(VENV)/bin/python docs/build.py site

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find internvl tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that a new environment gets, so an interrupted one is made again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "internvl needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(PINS) | $(VENV)/bin/pip
	$(call install,demo)
	$(bytecode)
	@touch $@

$(VENV)/.slow: $(VENV)/.dev
	$(call install,lowbit)
	@touch $@

# dev contains demo, so both are done.
$(VENV)/.dev: $(PINS) | $(VENV)/bin/pip
	$(call install,dev)
	$(bytecode)
	@touch $(VENV)/.demo $@
