# The front door. `make figures` needs Python 3.11 or newer, make and bash; the rest it gets itself.
# What has to rerun is decided by content in tools/runner.py, not here.

SHELL := bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup figures smoke rehearse test regress pair sweep audit book slides status clean environment crosscoder

PROFILE ?= toy
NB ?=
CROSSCODER ?=
RAY ?=
JOBS ?=
TORCH_INDEX ?=
SEED ?=
PYTHON ?=

notebooks := $(if $(NB),--notebook $(NB))
jobs := $(if $(JOBS),--jobs $(JOBS))
seed := $(if $(SEED),--seed $(SEED))
bin := $(if $(filter Windows_NT,$(OS)),Scripts,bin)

# VENV not set: bootstrap .venv. VENV= (empty): the current python. VENV=path: that environment.
ifeq ($(origin VENV),undefined)
  python := .venv/$(bin)/python
else ifeq ($(strip $(VENV)),)
  python := $(or $(PYTHON),python)
else
  python := $(VENV)/$(bin)/python
endif

recent_enough := import sys; sys.exit(sys.version_info < (3, 11))

# Sets $found to the first Python that is new enough. The lock was made with 3.11, so that one first.
find_python = found=; \
	for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python); do \
		if "$$candidate" -c '$(recent_enough)' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "error: Python 3.11 or newer is needed, and none of these is:" \
			"$(or $(PYTHON),python3.11 python3 python3.12 python3.13 python)." \
			"Install it, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi

# Said before anything is installed: on Linux pip's torch brings CUDA along, whether or not there is a
# card. nvidia-smi comes with the driver; in WSL2 it lies beside the path.
say_cpu_build = if [ "$$(uname -s)" = Linux ] && [ -z '$(TORCH_INDEX)' ] \
		&& ! command -v nvidia-smi >/dev/null && [ ! -e /proc/driver/nvidia/version ] \
		&& [ ! -e /usr/lib/wsl/lib/nvidia-smi ]; then \
		echo "no NVIDIA driver here: the CPU build of torch saves about 2.5 GB of download;" \
			"to have it, stop and run: make $(or $(firstword $(MAKECMDGOALS)),setup)" \
			"TORCH_INDEX=https://download.pytorch.org/whl/cpu"; \
	fi

help: ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PROFILE=smoke    for figures and status: smoke (minutes), toy (default), qwen (GPU)"
	@echo "  NB=05            only notebook 05 and what it needs"
	@echo "  JOBS=1           notebooks at a time; not given, as many as the cores allow"
	@echo "  VENV=            use the current python (conda, Colab); VENV=dir that environment;"
	@echo "                   not given, .venv is made and kept up to date"
	@echo "  PYTHON=python3   the Python that .venv is made with"
	@echo "  TORCH_INDEX=url  where torch comes from when .venv is made: CPU or CUDA builds, for example"
	@echo "                   https://download.pytorch.org/whl/cpu; not given, as pip is configured"

setup: environment ## make .venv, or bring it up to date (about 2.5 GB)

figures: environment ## execute the notebooks that changed; figures/ and notebooks/ are their result
	@$(python) -m tools.runner run --profile '$(PROFILE)' $(notebooks) $(jobs)

smoke: environment ## the same with tiny budgets, into build/smoke/
	@$(python) -m tools.runner run --profile smoke $(notebooks) $(jobs)

rehearse: environment ## PROFILE=mine.json: your own pair all the way at smoke's sizes, and what the full run needs
	@$(python) -m tools.rehearse '$(PROFILE)' $(jobs)

# Files in their order: sorted by their number of tests, the longest one would come last, alone.
test: environment ## ruff, pytest, and every notebook at smoke through nbval
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(python) -m tools.runner check --profile smoke $(notebooks) $(jobs)

regress: environment ## every notebook at toy through nbval, its rounded results compared
	$(python) -m tools.runner check --profile toy $(notebooks) $(jobs)

# Training takes the machine's own arithmetic (about 1.5x faster), measuring the one of all machines.
pair: environment ## remake the embedded pairs of models from nothing (resumes; SEED=1: one of them)
	@DFC_ARITHMETIC=native $(python) -m tools.make_pair $(seed) --until rl
	@$(python) -m tools.make_pair $(seed)

crosscoder: environment ## remake data/crosscoder, which the quickstart shows (after notebook 01)
	@$(python) -m tools.ship

sweep: environment ## the 48 crosscoders of notebook 08 (resumes; RAY=1: on a Ray cluster)
	@$(python) -m tools.sweep --profile '$(PROFILE)' $(if $(RAY),--ray)

audit: environment ## does releasing a crosscoder leak the skill? CROSSCODER=folder or hub name (PROFILE= its pair)
	@$(python) -m tools.audit '$(CROSSCODER)' --profile '$(PROFILE)'

book: environment ## the notebooks as a website in build/book/html (nothing is executed)
	$(python) book/build.py build/book
	@echo "build/book/html/index.html"

slides: environment ## slides from the executed notebooks in build/slides (nothing is executed)
	@$(python) -m tools.slides

status: ## which notebooks and figures are stale, and why
	@python='$(python)'; if ! "$$python" -c '$(recent_enough)' 2>/dev/null; then \
		$(find_python); python="$$found"; fi; \
	"$$python" -m tools.runner status --profile '$(PROFILE)'

clean: ## delete build/ and caches; notebooks, figures and .venv stay
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find dfc_lib tools tests -name __pycache__ -prune -exec rm -rf {} +

ifeq ($(origin VENV),undefined)
# .venv/.complete holds what the environment was made from, so a checkout that only touches the times
# of these files costs nothing. .venv/.making marks one that was cut off while being made.
environment:
	@set -e; \
	indexed=true; \
	if [ -n '$(TORCH_INDEX)' ] && ! echo '$(TORCH_INDEX)' | cmp -s - .venv/.torch-index; then \
		indexed=false; \
	fi; \
	if $$indexed && cat requirements.lock pyproject.toml | cmp -s - .venv/.complete \
		&& $(python) -c '$(recent_enough)' 2>/dev/null; then exit 0; fi; \
	$(find_python); \
	$(say_cpu_build); \
	if [ -e .venv/.making ] || ! $(python) -c '$(recent_enough)' 2>/dev/null \
		|| ! $(python) -m pip --version >/dev/null 2>&1; then \
		echo "making .venv with $$found ($$("$$found" --version)); about 2.5 GB, some minutes"; \
		rm -rf .venv; mkdir .venv; touch .venv/.making; \
		"$$found" -m venv .venv; \
	fi; \
	if [ -e .venv/.complete ]; then mv .venv/.complete .venv/.making; fi; \
	export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	if ! $$indexed; then $(python) -m pip uninstall -q -y torch; fi; \
	{ $(python) -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
			"$$(grep '^torch==' requirements.lock)" \
		&& $(python) -m pip install -r requirements.lock \
		&& $(python) -m pip install --no-deps --no-build-isolation -e .; \
	} || { \
		rm -f .venv/.making; \
		echo "error: pip failed, see above; what it did is kept, and make goes on from there" >&2; \
		exit 1; \
	}; \
	if [ -n '$(TORCH_INDEX)' ]; then echo '$(TORCH_INDEX)' > .venv/.torch-index; fi; \
	rm -f .venv/.making; \
	cat requirements.lock pyproject.toml > .venv/.complete
else
environment:
	@$(python) -c '$(recent_enough)' || { \
		echo "error: '$(python)' should be Python 3.11 or newer (VENV='$(VENV)' was given)" >&2; \
		exit 1; }
	@$(python) -c 'import sys; from importlib.util import find_spec as f; \
	m = [n for n in "torch transformer_lens sae_lens papermill nbval".split() if not f(n)]; \
	sys.exit(f"error: {sys.executable} lacks {m}; run: pip install -r requirements.lock" if m else 0)'
endif
