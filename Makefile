# make demo: set up and run the main job on the CPU.  make test: set up and pass every test.  make check: the fast part.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: setup demo check test bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/bca-export --opset 17 --checkpoint examples/01_digits/matcher.safetensors --prefix fusion. --heads 4 \
		--expect examples/01_digits/sample.npz --out build/demo --force
	$(BIN)/bca inspect build/demo

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m 'not slow'

test: check
	$(PYTEST) -m slow

bench: $(READY)
	$(BIN)/python benchmarks/attention.py

clean:
	rm -rf $(VENV) build dist
