# Every target installs what it needs into .venv, once; interrupted, it goes on where it was.
#   make demo ARGS="--minutes 3"     make test      make lint      make help
# PYTHON=python3.12            the interpreter that .venv is made from
# PY=python3                   use this Python as it stands and install nothing
# TORCH_INDEX=URL              take torch and torchvision from this index (a CPU build is a tenth of the size)

VENV ?= .venv
PY ?= $(VENV)/bin/python
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(KEY)
TRITON := $(VENV)/.triton-$(KEY)
ifeq ($(origin PY),command line)
STAMP :=
TRITON :=
endif

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -qq --progress-bar off -c constraints.txt
PYTEST := $(PY) -m pytest
SLOW := $(PYTEST) -m "slow and not gpu" --timeout 900 $(ARGS)
PACKAGES := configs data_pipeline pretrain retrieval_eval slurm videomamba

.PHONY: help install demo test test-slow test-gpu lint format clean
.DEFAULT_GOAL := help

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14

install: $(STAMP)  ## the environment alone

demo: $(STAMP)  ## from raw clips to encoders and a page to look at; ARGS="--minutes 3" for the quick one
	$(PY) -P -m videomamba demo $(ARGS)

test: $(STAMP) $(TRITON)  ## every test that is neither slow nor for a GPU; ARGS are pytest's
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not gpu" -n 2 --dist worksteal $(ARGS)

test-slow: $(STAMP) $(TRITON)  ## the tests that take longer
	@said=$$(mktemp); trap 'rm -f "$$said"' EXIT; \
	echo "the Slurm cluster's tests run beside the others and are shown after them"; \
	$(SLOW) tests/slurm >"$$said" 2>&1 & cluster=$$!; \
	$(SLOW) tests --ignore tests/slurm; others=$$?; \
	wait $$cluster; cluster=$$?; cat "$$said"; \
	for code in $$others $$cluster; do case $$code in 0 | 5) ;; *) exit $$code ;; esac; done  # 5: ARGS left none

test-gpu: $(STAMP) $(TRITON)  ## the tests that need an NVIDIA GPU
	$(PYTEST) -m gpu --timeout 900 $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)  ## let ruff lay the code out
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove .venv, caches and builds; runs/ and demo/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp carries a checksum of what decides the environment, so a changed pyproject.toml installs again.
# torch comes first, because DeepSpeed asks for it while it is being built.
$(VENV)/.installed-%:
	@echo "==> Python"
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11 or later was found ($$(python3 --version 2>&1 || true))."; \
	    echo "  cure: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; \
	  fi; \
	  $$found --version; \
	  if ! $$found -m venv --clear $(VENV); then \
	    rm -rf $(VENV); \
	    echo "error: $$found cannot make a virtual environment."; \
	    echo "  cure: on Debian and Ubuntu, apt-get install python3-venv, then the same command again."; exit 1; \
	  fi; \
	fi
	@echo "==> torch$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	@if [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null && ! $(VENV)/bin/python -c 'import torch' 2>/dev/null; then \
	  echo "    (no GPU here: if pip now fetches gigabytes of CUDA, see TORCH_INDEX in README.md)"; \
	fi
	@$(PIP) setuptools wheel packaging ninja
	@$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision,$(PIP) torch)
	@echo "==> videomamba, what it stands on, and the tools of development"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@
	@echo "==> installed in $(VENV)"

# The tests run the Triton kernels in its interpreter and compile them for a GPU that is not here. Nothing else needs
# Triton, so its 200 MB come with the tests alone; without them those tests skip and say why (in CI they fail).
$(VENV)/.triton-%: $(STAMP)
	@echo "==> triton, for the tests of its kernels"
	@if $(PIP) --retries 1 --timeout 30 triton; then rm -f $(VENV)/.triton-* && touch $@; \
	else echo "    not to be had; the tests of the Triton kernels will skip"; fi
