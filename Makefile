# Everything a person types; `make` alone lists it. Each target installs what it needs; a second call installs nothing.
# PYTHON picks the interpreter of the environment (any from 3.11 to 3.14); without it, install.sh finds one.
# detectron2 is not on PyPI under its name; sal-detectron2 is the same Python code (see README, "Installing detectron2").
# `make install DETECTRON2=git+https://github.com/facebookresearch/detectron2.git` builds the official one instead.
VENV ?= .venv
BIN := $(VENV)/bin
IMAGE ?= ray-detectron2-benchmark:0.2.0
# What builds the image: the first that works. Another base: `make image BASE=docker.io/library/python:3.13-bookworm`.
ENGINE ?= $(shell for engine in docker podman buildah; do $$engine info > /dev/null 2>&1 && echo $$engine && break; done)
CONFIG ?= configs/scale_out.yaml
SEEDS ?= 20
CHAOS ?=
BENCHMARK := runs/demo_benchmark/$(shell date -u +%Y-%m-%dT%H-%M-%SZ)
ADDRESS ?= http://127.0.0.1:8265
RUNS ?= /mnt/shared/runs
TESTS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo demo-benchmark test test-cluster test-faults test-image chaos check hooks bench bench-gpu ui \
	schema lock image mlflow-server submit

help:  ## This list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## The environment in .venv; PYTHON=python3.12 picks the interpreter
	@PYTHON='$(PYTHON)' VENV='$(VENV)' EXTRAS='$(EXTRAS)' DETECTRON2='$(DETECTRON2)' sh install.sh

demo: install  ## The main job on generated data, on CPU, in minutes
	$(BIN)/python -m orchestrator.run

demo-benchmark: install  ## Five seeds on CPU in minutes: a score, a verified bundle, a page with published figures
	$(BIN)/python -m orchestrator.run configs/demo_benchmark.yaml --output $(BENCHMARK)
	$(BIN)/python -m orchestrator.bundle $(BENCHMARK) --to $(BENCHMARK).zip
	$(BIN)/python -m orchestrator.bundle verify $(BENCHMARK).zip
	$(BIN)/python -m orchestrator.report $(BENCHMARK).zip references/*.yaml --to $(BENCHMARK)-page

# Two files at a time, in the order of their names: most tests wait for processes more than they compute.
test: install  ## The tests; TESTS='tests/orchestrator -k table' picks some; COVERAGE=1 measures and gates coverage
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(COVERAGE),--cov --cov-report=term:skip-covered) $(TESTS)

test-cluster: install  ## Tests on several hosts, made of network namespaces (skipped without these); QUICK=1: most of them
	$(BIN)/python -m pytest -m "cluster$(if $(QUICK), and not soak)" tests/cluster

test-faults: install  ## All tests of faults, in an hour; `make test` has the faster ones
	$(BIN)/python -m pytest -m "not cluster" tests/faults

test-image: install  ## Tests of the container image
	$(BIN)/python -m pytest -m image tests/cluster

chaos: install  ## SEEDS=20 runs of 70 seconds with random faults; CHAOS='--mtbf 30 --min-goodput 0.8' are more options
	$(BIN)/python -m tests.faults.chaos --seeds $(SEEDS) $(CHAOS)

check: install  ## Lint, format, types, layers, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .

hooks: install  ## Run the tools of `make check` on every commit
	$(BIN)/pre-commit install

bench: install  ## This program against plain detectron2, side by side
	$(BIN)/python -m benchmarks.run

bench-gpu: install  ## The real model on this machine's GPU, in eight minutes
	$(BIN)/python -m benchmarks.gpu

ui: install  ## MLflow's pages on the runs of this folder
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

image:  ## The container image of a cluster's nodes
	@test -n '$(ENGINE)' || { echo 'no docker, podman or buildah that works is at hand' >&2; exit 2; }
	$(ENGINE) build $(if $(BASE),--build-arg BASE=$(BASE)) --tag $(IMAGE) --file docker/Dockerfile $(BUILD_OPTIONS) .

mlflow-server: install  ## MLflow on PostgreSQL, with a password; SERVER='--host 10.0.0.10 --allowed-host mlflow.internal'
	$(BIN)/python -m cluster.mlflow_server $(SERVER)

# The names go through two shells, the second one on the cluster.
submit: install  ## CONFIG=... as a job of the cluster at ADDRESS=...; with JOB=NAME, again, it goes on in RUNS=.../NAME
	@case '$(JOB)' in *[!A-Za-z0-9._-]*) echo 'JOB=$(JOB): letters, digits, ".", "_" and "-" only' >&2; exit 2;; esac
	@case '$(CONFIG)' in /*) ;; *) test -f '$(CONFIG)' || { echo 'CONFIG=$(CONFIG): no such file here' >&2; exit 2; };; esac
	$(BIN)/ray job submit --address $(ADDRESS) --working-dir . --runtime-env cluster/job.yaml \
		--metadata-json '{"git_commit": "$(shell git rev-parse HEAD)", "submitted_by": "$(shell whoami)"}' \
		-- exec python -m orchestrator.run '$(CONFIG)' \
		$(if $(JOB),--output '$(RUNS)/$(JOB)' --resume auto --auto-resume 3)

schema: install  ## configs/experiment.schema.json, from which editors complete experiment files
	$(BIN)/python -m orchestrator.experiment.spec > configs/experiment.schema.json

# The pins are one set for all versions: packages are resolved on the Python at hand, then every version is asked whether
# a wheel of each pin exists for it. Three packages have no wheels; they are pure Python and built on installation.
lock:  ## constraints.txt, resolved again from the ranges in pyproject.toml and checked for Python 3.11 to 3.14
	$$(sh install.sh --find) -m venv --clear .venv-lock
	.venv-lock/bin/pip install '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable --exclude ray-detectron2-benchmark > constraints.txt
	grep -vE '^(antlr4-python3-runtime|fvcore|iopath)=' constraints.txt > .venv-lock/wheels.txt
	for version in 3.11 3.12 3.13 3.14; do .venv-lock/bin/pip install --quiet --dry-run --no-deps --only-binary=:all: \
		--python-version $$version --target .venv-lock/none --requirement .venv-lock/wheels.txt || exit 1; done
	rm -r .venv-lock build
