# make setup   the environment alone        make demo   data, before, training, after
# make test    lint, types and all tests    make stages the tiny recipe under seven configurations
# make clean   forget the environment
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# As a variable it also pins what builds the packages that come as source.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: setup demo stages test clean
setup: .venv/ready

.venv/ready: constraints.txt setup.cfg pyproject.toml
	@echo "== setting up .venv: about 80 packages, a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@echo "== building DeepSpeed's C++ extensions: once, about a minute each, kept in the user's cache folder"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m loop.engine.extensions
	@touch $@

demo: setup
	@echo "== data"
	$(BIN)/python -m data.sums
	@echo "== before: the base model on 20 of the 200 held-out numbers"
	$(BIN)/python -m eval.run --config loop/recipes/tiny.yaml --limit 20
	@echo "== training: two processes, DeepSpeed ZeRO-3, about two minutes"
	PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch --config_file accel_configs/zero3.yaml loop/train.py
	@echo "== after: both models on all 200"
	$(BIN)/python -m eval.run --run "$$(ls -td runs/tiny-* | head -1)"

stages: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m eval.stages -- --epochs 3

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf .venv
