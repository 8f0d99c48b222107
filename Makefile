# A fresh machine needs Python 3.11 or newer and make; `make demo` and `make test` install the rest.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-image lint format lock image clean

DATA ?= ../shared/data
VENV := .venv
PYTHON := $(VENV)/bin/python
# Its date says when the environment was last brought in line with the lock.
READY := $(VENV)/.ready
# Use the uv that is there; without one, install it into a venv of its own in the user's cache.
UV_HOME := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vaefeat-uv
UV = $$(command -v uv || echo $(UV_HOME)/bin/uv)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

BOOTSTRAP = command -v uv >/dev/null || test -x $(UV_HOME)/bin/uv || \
	{ python3 -m venv $(UV_HOME) && $(UV_HOME)/bin/pip install --quiet uv; }

# Where Python may not keep the bytecode that it compiles, each of the tests' many processes would compile all anew.
SYNC = $(UV) pip sync --quiet $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

$(READY): requirements.lock pyproject.toml
	@$(BOOTSTRAP)
	@echo "installing into $(VENV)"
	@test -x $(PYTHON) || $(UV) venv --quiet --python '>=3.11' $(VENV)
	@$(SYNC) --python $(PYTHON) requirements.lock
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

# The public clients that tests talk to the service with; their pins clash with ours.
CLIENTS := .venv-clients/.ready
$(CLIENTS): tests/clients/requirements.lock
	@$(BOOTSTRAP)
	@echo "installing the tests' clients into .venv-clients"
	@test -x .venv-clients/bin/python || $(UV) venv --quiet --python '>=3.11' .venv-clients
	@$(SYNC) --python .venv-clients/bin/python $<
	@touch $@

# The servers that benchmarks.serve measures against: MLServer's pins clash with the others'.
PEERS := benchmarks/serve_peers
.venv-peers/.ready: $(PEERS)/requirements.lock $(PEERS)/mlserver.lock
	@$(BOOTSTRAP)
	@echo "installing the servers to measure against into .venv-peers"
	@test -x .venv-peers/peers/bin/python || $(UV) venv --quiet --python '>=3.11' .venv-peers/peers
	@test -x .venv-peers/mlserver/bin/python || $(UV) venv --quiet --python '>=3.11' .venv-peers/mlserver
	@$(SYNC) --python .venv-peers/peers/bin/python $(PEERS)/requirements.lock
	@$(SYNC) --python .venv-peers/mlserver/bin/python $(PEERS)/mlserver.lock
	@touch $@

demo: $(READY) ## the main job on scikit-learn's digits: pretrain, serve, embed, classify, report
	$(PYTHON) -m pipelines run pipelines/configs/digits.toml

# Two files of tests at a time, each on one thread: more would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses=2 --dist=loadfile --data-dir=$(DATA)

test: $(READY) $(CLIENTS) ## the tests, without those marked slow, gpu or serve
	$(PYTEST) -m "not slow and not gpu and not serve and not image"

test-all: $(READY) $(CLIENTS) ## all tests but the image's; those marked gpu need a CUDA device
	$(PYTEST) -m "not image"

test-image: $(READY) ## build and run the container images; as root, with buildah, mmdebstrap and runc, or it is skipped
	$(PYTHON) -m pytest tests/e2e/test_image.py

lint: $(READY) ## ruff, mypy --strict, import-linter
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/hadolint Dockerfile

format: $(READY) ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# Versions for all platforms and Pythons, with hashes and without the address of an index.
COMPILE := pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --upgrade --quiet

lock: ## renew the requirements.lock files
	@$(BOOTSTRAP)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) $(COMPILE) pyproject.toml --all-extras --group dev \
		--output-file requirements.lock
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) $(COMPILE) tests/clients/requirements.in \
		--output-file tests/clients/requirements.lock
	for name in requirements mlserver; do UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) $(COMPILE) \
		$(PEERS)/$$name.in --output-file $(PEERS)/$$name.lock; done

image: ## the service's container image (needs a container engine); CUDA with ACCELERATOR=cuda, training with TARGET=full
	docker build --build-arg ACCELERATOR=$(or $(ACCELERATOR),cpu) --build-arg REVISION=$(shell git rev-parse HEAD) \
		--target $(or $(TARGET),serve) --tag vaefeat .

clean: ## remove what is generated, but not runs/
	rm -rf $(VENV) .venv-clients .venv-peers build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
