# Everything runs in .venv, which is created when missing. PYTHON chooses the interpreter that creates it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo demo-page test test-all test-long test-lowest test-lowest-fast test-browser lint format package docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.venv/installed .venv/installed-demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed; choose one with: make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

.venv/installed: EXTRAS := dev
.venv/installed-demo: EXTRAS := train,analysis
# What developers have is enough for the demonstration.
FOR_DEMO := $(if $(wildcard .venv/installed),.venv/installed,.venv/installed-demo)

install: .venv/installed  ## create .venv and install the project with its tools for developers

demo: $(FOR_DEMO)  ## see a trained model's routing, then train on handwritten digits and draw it (2 to 5 minutes)
	$(BIN)/python tools/demo.py

demo-page: .venv/installed  ## write a page that runs the shipped model in the browser, into runs/demo-page/
	$(BIN)/python tools/demo_page.py assets/models/cifar100_tiny.safetensors --out runs/demo-page

# A process a core, each with one thread: tests are many and small.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: .venv/installed  ## run the tests
	$(PYTEST)

test-all: .venv/installed  ## run the slow tests too: kills, resumption, several processes, exports
	$(PYTEST) -m "not long and not gpu and not browser"

test-long: .venv/installed  ## run what takes minutes or the network, before a release: notebooks, an install, the export of every family
	$(PYTEST) -m long

LOWEST := .venv-lowest
$(LOWEST)/installed $(LOWEST)/installed-fast: pyproject.toml tests/lowest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 10), (3, 11)])' \
	  || { echo "The lowest versions come for Python 3.10 and 3.11; choose one with: make PYTHON=python3.11 test-lowest"; exit 2; }
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint tests/lowest.txt \
	  --editable $(NEEDED)
	@touch $@

$(LOWEST)/installed: NEEDED := '.[dev]'
$(LOWEST)/installed-fast: NEEDED := '.[train,analysis,tune,cluster,jax,export,webdataset,data]' pytest pytest-xdist hypothesis
FOR_LOWEST_FAST := $(if $(wildcard $(LOWEST)/installed),$(LOWEST)/installed,$(LOWEST)/installed-fast)
# What has broken with old versions before: surgery, routing, torch.export, augmentation, checkpoints, the lines of errors.
LOWEST_FAST := $(addprefix tests/,test_checkpoints.py checkpoints export/test_exported_layer.py training/test_initial.py \
  $(addprefix moe/test_,config.py parity.py routers.py slot_routers.py) \
  $(addprefix models/test_,surgery.py sources.py jax_files.py padding.py) \
  $(addprefix data/test_,augment.py draws.py) reliability/test_errors.py)

test-lowest: BIN := $(LOWEST)/bin
test-lowest: $(LOWEST)/installed  ## run the tests with the oldest versions that the project supports
	$(PYTEST)

test-lowest-fast: BIN := $(LOWEST)/bin
test-lowest-fast: $(FOR_LOWEST_FAST)  ## run the part of test-lowest that old versions are the likeliest to break
	$(PYTEST) $(LOWEST_FAST)

test-browser: .venv/installed  ## run the tests that look at pages (need Debian's chromium and chromium-driver)
	$(BIN)/python -m pytest -m browser tests/browser

lint: .venv/installed  ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: .venv/installed  ## mend style and format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

package: .venv/installed  ## build the wheel and the source archive into dist/, and check what the package index would
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: .venv/installed-docs  ## build the documentation as a site into site/; a broken link is an error
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove the environment, what was built and the caches; runs stay
	rm -rf .venv .venv-lowest dist site .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
