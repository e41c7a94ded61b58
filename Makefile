# make demo   train on the built-in textures and show what SimCLR learned
# make demo-v2   and fine-tune on few labels, and distil
# make test   the fast tests; make soak: the long ones; make lint: ruff; make bench: loss, views and step against their peers
# make gpu    checks and measurements on an NVIDIA GPU, with the packages of $(GPU_PYTHON)
# make docs   the documentation as a site in site/
PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-v2 test browser soak bench gpu lint docs clean

# the launcher's defaults, spelled out: without them it prints a warning
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

demo: .venv/installed
	$(LAUNCH) train.py

demo-v2: .venv/installed
	$(BIN)/python -m bench.demo_v2

# two processes of one thread each; a file's tests share their fixtures, so they stay together
test: .venv/installed browser
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# for the tests of report.html; elsewhere than on Debian they are skipped without Chromium
browser:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
	(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium \
	fonts-dejavu-core >/dev/null) || echo "Chromium could not be installed; tests that need it are skipped."

soak: .venv/installed
	$(BIN)/pytest -m soak

bench: .venv/installed
	$(BIN)/python -m pip install --quiet --requirement requirements-bench.lock
	$(BIN)/python bench/loss_kernel.py
	$(BIN)/python bench/pipeline.py
	$(BIN)/python -m bench.train_step

# not .venv: a machine with a GPU often has its own build of torch. A process each, because an illegal memory access
# ends all work of a process on the GPU.
gpu:
	status=0; for part in correctness loss step dali; do $(GPU_PYTHON) -m bench.gpu $$part || status=1; done; \
	$(GPU_PYTHON) -m bench.gpu.tables; exit $$status

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/installed
	$(BIN)/mkdocs build --quiet --strict

.venv/installed: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	touch $@

clean:
	rm -rf .venv
