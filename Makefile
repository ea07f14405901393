# Everything a person types. Each target installs what it needs; a second call installs nothing.
PYTHON ?= python3.11
# detectron2 is not on PyPI under its name; sal-detectron2 is the same Python code (see README, "Installing detectron2").
# `make install DETECTRON2=git+https://github.com/facebookresearch/detectron2.git` builds the official one instead.
DETECTRON2 ?= sal-detectron2==0.7.2
BIN := .venv/bin
INSTALLED := .venv/installed
EXTRAS ?= dev
IMAGE ?= ray-detectron2-benchmark:0.1.0
# What builds the image: the first that works. Another base: `make image BASE=docker.io/library/python:3.11-bookworm`.
ENGINE ?= $(shell for engine in docker podman buildah; do $$engine info > /dev/null 2>&1 && echo $$engine && break; done)
CONFIG ?= configs/scale_out.yaml
SEEDS ?= 20
ADDRESS ?= http://127.0.0.1:8265

.PHONY: install demo test test-cluster test-image chaos check bench bench-gpu ui schema lock image mlflow-server submit

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt install_detectron2.sh
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	sh install_detectron2.sh '$(DETECTRON2)' $(BIN)
	touch $@

demo: install
	$(BIN)/python -m orchestrator.run

test: install
	$(BIN)/python -m pytest

test-cluster: install  ## scenes on several hosts, made of network namespaces; skipped where these cannot be made
	$(BIN)/python -m pytest -m cluster tests/cluster

test-image: install
	$(BIN)/python -m pytest -m image tests/cluster

chaos: install  ## SEEDS runs with random faults, each compared with an undisturbed one
	$(BIN)/python -m pytest -m soak tests/faults
	$(BIN)/python -m tests.faults.chaos --seeds $(SEEDS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks.run

bench-gpu: install  ## the real model on this machine's GPU
	$(BIN)/python -m benchmarks.gpu

ui: install
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

image:
	@test -n '$(ENGINE)' || { echo 'no docker, podman or buildah that works is at hand' >&2; exit 2; }
	$(ENGINE) build $(if $(BASE),--build-arg BASE=$(BASE)) --tag $(IMAGE) --file docker/Dockerfile $(BUILD_OPTIONS) .

mlflow-server: install  ## MLflow on PostgreSQL, with a password; SERVER='--host 10.0.0.10 --allowed-host mlflow.internal'
	$(BIN)/python -m cluster.mlflow_server $(SERVER)

submit: install  ## CONFIG as a job of the cluster at ADDRESS; Ctrl-C leaves it running
	$(BIN)/ray job submit --address $(ADDRESS) --working-dir . --runtime-env cluster/job.yaml \
		--metadata-json '{"git_commit": "$(shell git rev-parse HEAD)", "submitted_by": "$(shell whoami)"}' \
		-- exec python -m orchestrator.run $(CONFIG)

schema: install  ## configs/experiment.schema.json, from which editors complete experiment files
	$(BIN)/python -m orchestrator.experiment.spec > configs/experiment.schema.json

lock:  ## constraints.txt anew, from the ranges in pyproject.toml
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable --exclude ray-detectron2-benchmark > constraints.txt
	rm -r .venv-lock build
