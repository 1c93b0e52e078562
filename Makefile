# Three commands do everything on a fresh machine: `make demo`, `make network` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo network test lint bench peers soak fuzz mutants table data clean help

help:
	@echo "make demo    the main job: four hospitals, one model, a privacy bill that verifies (out/demo)"
	@echo "make network four hospitals and a coordinator as processes of their own, over mutual TLS (out/network)"
	@echo "make test    the tests (under 10 minutes on two cores)"
	@echo "make lint    ruff, mypy --strict, import-linter"
	@echo "make table   the accuracy tables of README: local noise, shared noise, Fashion-MNIST against central DP-SGD (half an hour)"
	@echo "make bench   measured figures: the link beside stock Flower, 1,000 clients a round, simulation beside its peers, accounting"
	@echo "make peers   environments of the simulation engines that make bench compares with (.peers/, 5 GB)"
	@echo "make fuzz    ten minutes of hostile input for every parser (FUZZ_SECONDS=600)"
	@echo "make mutants every small change of accounting.py and verifier.py that a test must notice (hours; MUTANTS=200 takes a sample)"
	@echo "make soak    kill -9 at 50 random points of a run, then --resume; every fault of a network; 10,000 adversarial streams at one budget"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Hansa needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[train]' -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -e '.[train,dev]' -c constraints.txt
	@touch $@ $(VENV)/.train

demo: $(VENV)/.train
	$(BIN)/hansa demo --out out/demo

network: $(VENV)/.train
	$(BIN)/hansa network --out out/network

# Fashion-MNIST, and a library that shows a process another time of day, come from Debian packages; where they cannot be
# installed their tests say so and are skipped.
data:
	@test -e /usr/share/datasets/fashion-mnist || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    (apt-get install -y -qq dataset-fashion-mnist || (apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist)) >/dev/null 2>&1; } || \
	  echo "Fashion-MNIST is not installed (needs root: apt-get install dataset-fashion-mnist); its test will be skipped"
	@test -e /usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1 || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    (apt-get install -y -qq faketime || (apt-get update -qq && apt-get install -y -qq faketime)) >/dev/null 2>&1; } || \
	  echo "libfaketime is not installed (needs root: apt-get install faketime); the tests of wrong clocks will be skipped"

test: $(VENV)/.dev data
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.dev $(BIN)/lint-imports

table: $(VENV)/.train data
	$(BIN)/hansa simulate configs/heart.yaml --baselines --seeds 10 --out out/heart-table
	$(BIN)/python tests/bench/shared_table.py

bench: $(VENV)/.dev
	$(BIN)/python tests/bench/link.py
	$(BIN)/python tests/bench/secagg.py
	$(BIN)/python tests/bench/shared_rounds.py
	@test -e .peers/flwr/.made -a -e .peers/pfl/.made -a -e .peers/fluke/.made || echo "peers that are not in .peers/ will be skipped: make peers"
	$(BIN)/python tests/bench/simulation/table.py --out out/bench/simulation.json
	$(BIN)/python -m pytest -q -s -m bench tests

# The simulation engines of tests/bench/simulation, each in a virtual environment of its own, on the torch and Opacus that Hansa has.
PEER_pfl   := pfl[pytorch]==0.6.0
PEER_fluke := fluke-fl==0.8.1
PEER_flwr  := flwr[simulation]==1.41.0
peers: .peers/pfl/.made .peers/fluke/.made .peers/flwr/.made

.peers/%/.made: constraints.txt
	$(PYTHON) -m venv .peers/$*
	grep -E '^(torch|opacus)==' constraints.txt > .peers/$*/constraints.txt
	.peers/$*/bin/pip install -q '$(PEER_$*)' torch opacus -c .peers/$*/constraints.txt
	@touch $@

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -q -s -m soak tests

# Coverage-guided where atheris has a wheel (Linux on x86-64); elsewhere by hostile mutation alone.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.dev
	@$(BIN)/pip install -q --only-binary :all: atheris -c constraints.txt || echo "no atheris here: fuzzing without coverage"
	$(BIN)/python tests/fuzz --seconds $(FUZZ_SECONDS)

# In a copy of the tree; cosmic-ray has a virtual environment of its own, .mutants. docs/mutation-testing.md.
MUTANTS ?= 0
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutation --sample $(MUTANTS)

# The link's messages, after an edit of common/link.proto. The tool has a virtual environment of its own: it wants another protobuf.
proto:
	$(PYTHON) -m venv .proto && .proto/bin/pip install -q 'grpcio-tools==1.76.0' 'setuptools<81'
	mkdir -p .proto/src/hansa/common && cp common/link.proto .proto/src/hansa/common/
	cd .proto/src && ../bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. hansa/common/link.proto
	cp .proto/src/hansa/common/link_pb2.py* common/

clean:
	rm -rf $(VENV) .proto .mutants .peers out .mypy_cache .ruff_cache .pytest_cache .hypothesis
