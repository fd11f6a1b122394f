# make export   the tiny model, from raw text to an evaluated release
# make help     everything else

PYTHON ?= python3
PYTHON312 ?= python3.12
VENV ?= .venv
CONFIG ?= config/config.yaml
PROFILE ?= local
MODEL ?= artifacts/export/nano/model
NODE ?= export/nano
ANCHOR_PYTHON ?= $(VENV)/bin/python

export PATH := $(abspath $(VENV))/bin:$(PATH)
export VIRTUAL_ENV := $(abspath $(VENV))
export DVC_NO_ANALYTICS := 1
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
export PIPELINE_CONFIG := $(CONFIG)

.PHONY: help env env-nvidia export plan dag doctor status lineage verify diff clean chat check test cluster gpu bench bench-gpu bench-plan docs

help: ## show this
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

env: $(READY) ## create the environment from its lock

$(READY): envs/transformers.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing $$(grep -c == $<) packages into $(VENV); this takes a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(DEV): envs/dev.lock $(READY)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r envs/megatron.lock
	@touch $@

env-nvidia: ## the GPU engine's own environment: Python 3.12, CUDA's compiler, 45 minutes
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "error: $(PYTHON312) is not 3.12; name one: make env-nvidia PYTHON312=..." >&2; exit 1; }
	@command -v nvcc > /dev/null || \
	  { echo "error: no nvcc, which three packages are compiled with; or use envs/nvidia.Dockerfile" >&2; exit 1; }
	$(PYTHON312) -m venv .venv-nvidia
	.venv-nvidia/bin/python -m pip install --quiet $$(grep -E '^(torch|setuptools|ninja)==' envs/nvidia.lock)
	.venv-nvidia/bin/python -m pip install --quiet --no-deps --no-build-isolation -r envs/nvidia.lock
	.venv-nvidia/bin/python -m scripts.nvidia.versions envs/nvidia.lock

export: $(READY) ## build the model: tokenize … export, eval, report, release
	@snakemake --profile $(PROFILE) export

plan: $(READY) ## each node: what will happen, why, time and cost; PROFILE=slurm: on the cluster
	@python -m scripts.lib.plan $(if $(filter slurm,$(PROFILE)),--cluster slurm/cluster.yaml)

dag: $(READY) ## draw the graph of nodes: dag.svg, dag.png
	@python -m scripts.lib.plan --draw dag.svg --draw dag.png

doctor: $(READY) ## compare slurm/cluster.yaml with the cluster; what a run there needs
	@python -m scripts.lib.doctor

status: $(READY) ## each node's job, state and progress, also while a run is active
	@python -m scripts.lib.status

lineage: $(READY) ## what a node comes from, as text, lineage.svg, lineage.json: make lineage NODE=...
	@python -m scripts.lib.lineage show "$(NODE)" --svg lineage.svg --json lineage.json

verify: $(READY) ## recompute every digest of a node and its ancestors: make verify NODE=...
	@python -m scripts.lib.lineage verify "$(NODE)"

diff: $(READY) ## settings, data, code, versions, scores: make diff A=[REVISION:]NODE B=...
	@python -m scripts.lib.lineage diff "$(A)" "$(B)"

clean: $(READY) ## what could be freed, who needs the rest: YES=1 frees it, KIND= NODE= REFS= narrow
	@python -m scripts.lib.clean $(if $(filter 1 yes,$(YES)),--yes) $(addprefix --kind ,$(KIND)) \
	  $(if $(filter command environment,$(origin NODE)),--node "$(NODE)") $(if $(REFS),--refs $(REFS))

chat: $(READY) ## talk to the exported model: make chat MODEL=...
	@python -m scripts.chat $(MODEL)

check: $(DEV) ## format, lint, types, unit tests: two minutes
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint
	mypy
	pytest -q tests/unit

test: check ## everything: also the trainers, the real chain, a real Slurm
	pytest -q -n auto tests/bridge tests/cluster tests/engine tests/workflow

cluster: $(DEV) ## on a real Slurm of this machine: the chain, and each fault
	pytest -q tests/cluster

gpu: $(DEV) ## the engine nvidia on this machine's GPUs; without one it says so
	pytest -q -rs -n 8 tests/gpu

bench: $(DEV) ## data, publishing and planning against others: MEGATRON=... BRIDGE=...
	python -m tests.bench $(if $(MEGATRON),--megatron $(MEGATRON)) $(if $(BRIDGE),--bridge $(BRIDGE)) \
	  --anchor-python $(ANCHOR_PYTHON)

bench-gpu: $(DEV) ## steps a second against Megatron-Bridge and NeMo-RL called bare, and start-up
	python -m tests.gpu.bench
	python -m tests.gpu.bench --stage grpo

bench-plan: $(DEV) ## what a plan of 15, 200 and 2,000 current nodes costs
	python -m tests.bench.plan

docs: $(DEV) ## write what is generated: the README's config reference, dvc.yaml
	@python -m scripts.lib.docs README.md
	@python -m scripts.lib.plan > /dev/null
