# Everything a person types. Each target installs what it needs; a second call installs nothing.
PYTHON ?= python3.11
# detectron2 is not on PyPI under its name; sal-detectron2 is the same Python code (see README, "Installing detectron2").
# `make install DETECTRON2=git+https://github.com/facebookresearch/detectron2.git` builds the official one instead.
DETECTRON2 ?= sal-detectron2==0.7.2
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: install demo test check bench ui schema lock

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt install_detectron2.sh
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	sh install_detectron2.sh '$(DETECTRON2)' $(BIN)
	touch $@

demo: install
	$(BIN)/python -m orchestrator.run

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks.run

ui: install
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

schema: install  ## configs/experiment.schema.json, from which editors complete experiment files
	$(BIN)/python -m orchestrator.spec > configs/experiment.schema.json

lock:  ## constraints.txt anew, from the ranges in pyproject.toml
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install '.[dev]'
	.venv-lock/bin/pip freeze --exclude-editable --exclude ray-detectron2-benchmark > constraints.txt
	rm -r .venv-lock build
