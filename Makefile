# make setup | demo | test | test-all | bench | cluster-proof   (everything happens in .venv; nothing else is touched)
PYTHON ?= python3
BIN := .venv/bin
# A cluster that the shell knows is left alone: everything here starts a Ray of its own, which listens
# on loopback only.
unexport RAY_ADDRESS
export RAY_AUTH_MODE ?= disabled

.PHONY: setup demo lint types test test-all ray-tests network-tests other-tests bench cluster-proof

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12) and "Python 3.11 or 3.12 is needed, this is " + sys.version.split()[0] + "; name one: make PYTHON=python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# Demo data -> fine-tuning on local Ray -> evaluation -> report.html, in demo/.
demo: setup
	$(BIN)/scribbleseg data demo --out demo/data
	$(BIN)/python -m train.finetune demo --data.root demo/data --storage demo/runs --name demo
	$(BIN)/scribbleseg evaluate --checkpoint demo/runs/demo --data demo/data --split test --out demo/evaluation
	$(BIN)/scribbleseg report demo/runs/demo --data demo/data --split test --out demo/report.html

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright

# Tests run several processes at once; threads that spin while they wait for one another would slow
# all of them several times.
test test-all: export OMP_WAIT_POLICY ?= passive

# Those that may start Ray mostly wait for it, so that all the others run beside them.
RAY_TESTS := tests/cluster tests/serve tests/train tests/tune
NETWORK_TESTS := tests/loops tests/losses tests/models
CHECKS := --jobs=4 types ray-tests network-tests other-tests

test: lint
	$(MAKE) $(CHECKS) ONLY="-m 'not slow'"

test-all: lint
	$(MAKE) $(CHECKS)

ray-tests: setup
	$(BIN)/pytest -q $(ONLY) $(RAY_TESTS)

network-tests: setup
	$(BIN)/pytest -q $(ONLY) $(NETWORK_TESTS)

other-tests: setup
	$(BIN)/pytest -q $(ONLY) $(patsubst %,--ignore=%,$(RAY_TESTS) $(NETWORK_TESTS))

# The short forms of the benchmarks of speed, a quarter of an hour; tables in runs/benchmarks.
bench: setup
	test -d demo/data || $(BIN)/scribbleseg data demo --out demo/data
	$(BIN)/python -m benchmarks

# The road of docs/cluster.md and the faults that training survives, on hosts made of this machine's
# namespaces: Linux, as root, half an hour.
cluster-proof: setup
	$(BIN)/python -m tests.cluster.road --out cluster-proof
	$(BIN)/python -m tests.cluster.proof --out cluster-proof
