PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test soak lint format clean

demo: $(READY)  ## prune the built-in model on a local Ray and print what it cost
	$(BIN)/python -m neuronal_ray.prune --config jobs/demo.toml

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

soak: $(READY)  ## all bad inputs on all commands, some minutes; the tests try a sample
	PYTHONPATH=tests HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m bad_inputs

lint: $(READY)  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info
