# make quickstart   train OmniSIFT on the testbed, export it, compare it with training-free methods
# make test         the fast tests; test-all adds the slow ones
# make lint         ruff and mypy; format rewrites the files
#
# Each makes .venv when it is missing or older than the dependency lists. PYTHON=python3.11 chooses the interpreter.

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/ready
RUN := runs/quickstart
# Two processes, on a machine with a single GPU one: DeepSpeed gives each process a GPU of its own.
RANKS := import torch; print(1 if torch.cuda.device_count() == 1 else 2)

export PATH := $(BIN):$(PATH)
# Model and data are local files: a look at a hub would be a mistake.
export HF_HUB_OFFLINE := 1

.PHONY: quickstart test test-all lint format

quickstart: $(READY)
	$(BIN)/python tools/make_testbed.py runs/testbed
	$(BIN)/python tools/cache_features.py --config recipes/quickstart.yaml
	$(BIN)/deepspeed --num_gpus $$($(BIN)/python -c '$(RANKS)') train.py --config recipes/quickstart.yaml
	$(BIN)/python tools/export.py $(RUN) $(RUN)/export
	$(BIN)/python eval.py --config recipes/eval_testbed.yaml output_dir=$(RUN) \
		methods='[full,random,stvp,omnizip,divprune_om,$(RUN)/export]' ratios='[0.25]' questions_per_clip=10

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) tools/check_toolchain.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@
