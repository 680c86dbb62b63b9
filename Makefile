# Everything sets itself up: `make demo` and `make test` work from a fresh clone with Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-versions lint clean

$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --upgrade pip
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[train,eval,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/nextn demo

# One process a core, one thread each: tiny models gain nothing from more.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal

test-slow: $(STAMP)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[bitsandbytes]'
	$(VENV)/bin/python -m pytest -m slow

# The other supported versions of torch and transformers; makes and removes an environment for each.
test-versions:
	.ci/test-versions

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) .venv-versions.*
