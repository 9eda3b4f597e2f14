# make demo | test | test-all | test-faults | check | style | bench | docs | lock | clean; each sets up .venv from the lock file if need be.
# make gpu | gpu-evidence use $(PYTHON) and its packages as they are; WHEELS=FOLDER holds wheels of those that it lacks.
# make bench BENCHMARKS="stream start" measures these sections alone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed-from-lock
BENCH := .venv-bench
GPU_PACKAGES := build/gpu-packages
# A process for each core, each with whole files of tests; one takes up to 1.5 GB.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all test-faults check style bench gpu gpu-evidence gpu-packages docs lock lock-of clean setup

demo: $(STAMP)
	$(BIN)/lsmix demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

# Each call that writes failed, cut short and killed in turn, damage to each file, signals, races: about ten minutes.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -s -m "faults and (slow or not slow)"

check: style
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# In an environment of its own: the peers want older versions of some libraries than we do.
bench: $(BENCH)/.installed-from-lock
	$(BENCH)/bin/python -m benchmarks $(BENCHMARKS)

$(BENCH)/.installed-from-lock: requirements-torch.lock requirements-bench.lock pyproject.toml
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --requirement requirements-torch.lock
	$(BENCH)/bin/python -m pip install --quiet --no-deps --require-hashes --requirement requirements-bench.lock
	PYTHONWARNINGS=ignore $(BENCH)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The first run on a GPU: its tests, then speed and exactness in four minutes, to results/DATE-CARD/.
gpu: gpu-packages
	PYTHONPATH="$(CURDIR)/$(GPU_PACKAGES)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks gpu $(OPTIONS)

# All of CIFAR-10 through the paper's flow, pools and trainings; call it again until it is done, as 'make gpu-evidence OPTIONS=--help' says.
gpu-evidence: gpu-packages
	PYTHONPATH="$(CURDIR)/$(GPU_PACKAGES)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks gpu-evidence $(OPTIONS)

gpu-packages:
	$(PYTHON) -m benchmarks.gpu_packages $(GPU_PACKAGES) $(WHEELS)

# The site, in site/, to be opened from there. To edit with a preview: .venv/bin/mkdocs serve.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

setup: $(STAMP)

$(STAMP): requirements-torch.lock requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("lsmix needs Python 3.11 or newer, got " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-torch.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Updates requirements.lock and requirements-bench.lock from pyproject.toml, for all Pythons and systems. torch stays at the version in
# requirements-torch.lock, without a hash: an index may serve it for the CPU or for CUDA, and pip fetches the libraries that its build wants.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	$(MAKE) lock-of WANTED="--group dev --extra heic --extra hub --extra parquet --extra report --extra s3" LOCK=requirements.lock
	$(MAKE) lock-of WANTED="--group bench" LOCK=requirements-bench.lock
	rm -rf .venv-lock

lock-of:
	.venv-lock/bin/uv pip compile pyproject.toml $(WANTED) --constraint requirements-torch.lock --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --quiet --output-file $(LOCK).part
	( echo "# All packages but torch, of 'uv pip compile pyproject.toml $(WANTED)'. Written by 'make lock'."; \
	  awk '/^[^ ]/ { wanted = $$0 !~ /^(torch==|nvidia-|cuda-|triton==)/ } wanted' $(LOCK).part ) > $(LOCK)
	rm $(LOCK).part

clean:
	rm -rf .venv .venv-bench .venv-lock build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov site
