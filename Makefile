# make quickstart   the embedded stream, from an empty folder to the accuracy matrix
# make check        environment, lint, types, unit tests: no cluster; the aim is 3 minutes on two idle cores
# make test         the same and every other test that is not marked long; the aim is 12 minutes
# make cluster      the files under cluster/ alone; needs kubectl, docker compose and Prometheus' tools, and says loudly what it left out
# make image        the image built and overlays/kind run from it in containers, 20 minutes and 30 GB; as root on Debian, with buildah, Podman, kubectl
# make chaos        every test of tests/chaos, and every test anywhere that is marked long
# make soak         KILLS (50) random kills over a long stream: bit-equal results and nothing left behind
# make gpu         every method on a card, a whole run, and everything that docs/benchmarks.md has not measured, on a CUDA card, into build/gpu;
#                  half an hour, each section says its seconds; says loudly when there is no card
# make browser      report.html and the server's page in a real Chromium, where there is one; screenshots in build/
# make load         clients side by side on a server of the quickstart's run: throughput, latency, nothing mixed up
# make audit        known vulnerabilities of what is installed; fails, too, where their list cannot be reached
# make docs        the site in build/site, every link checked; make tutorial runs its commands, about 3 minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
export DS_BUILD_OPS := 0

# Two processes share the test files out. Files keep their order, for the long ones come early (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart check test cluster env env-test lint types clean

quickstart: env
	$(BIN)/diki-ray continual --config quickstart

check: env-test lint types
	$(PYTEST) tests/unit

test: env-test lint types
	$(PYTEST)

cluster: env-test
	$(BIN)/python -m pytest -rs tests/unit/test_cluster_*.py

.PHONY: image
image: env-test
	$(BIN)/python cluster/image/build.py
	$(BIN)/python cluster/image/trial.py

.PHONY: browser
browser: env-test
	REPORT_SCREENSHOTS=build/report SERVE_SCREENSHOTS=build/serve $(BIN)/python -m pytest -rs -m browser tests/browser

.PHONY: load
load: quickstart
	$(BIN)/python tests/soak/serve_load.py

.PHONY: gpu
gpu: env-test
	$(BIN)/python -m pytest -n 8 -rs -m "long or not long" tests/gpu tests/unit/test_to_device.py
	$(BIN)/python jobs/benchmark.py --model ViT-B-16 --device cuda --output build/gpu
	$(BIN)/diki-ray continual --config quickstart train.device=cuda train.num_workers=1 run.storage=build/gpu/storage
	$(BIN)/python jobs/benchmark.py --model ViT-B-16 --device cuda --sections compile --compile-mode reduce-overhead --output build/gpu/graphs
	@echo "build/gpu/*.md has what was measured, with its seconds: docs/benchmarks.md says which line each section fills."

.PHONY: audit
audit: env
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --local --skip-editable --strict

.PHONY: chaos soak
chaos: env-test
	$(BIN)/python -m pytest -m "long or chaos" --durations=0

.PHONY: docs tutorial
docs: env
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/python docs/generate_reference.py
	$(BIN)/mkdocs build --strict

tutorial: env-test
	$(BIN)/python -m pytest -m "long or not long" tests/ray/test_tutorial.py

KILLS ?= 50
soak: env-test
	$(BIN)/python tests/soak/soak.py --kills $(KILLS)

lint: env-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env-test
	$(BIN)/mypy

# The environment is current as long as pyproject.toml is not newer than its stamp.
env: $(VENV)/.installed
env-test: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
