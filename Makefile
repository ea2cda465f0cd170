# Two commands do everything: `make run` and `make test`. Each sets up .venv first, if that is not done yet.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Two workers of one thread each: a test waits for its child processes half of the time, and threads of two workers would
# wait for each other on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: run test quick lint install clean

run: install
	$(BIN)/prebench run --suite full

test: install lint
	$(PYTEST) -m "not slow and not cuda"
	$(PYTEST) -m "slow and not cuda"

quick: install
	$(PYTEST) -m "not slow and not cuda"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("prebench needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade "pip>=24"
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
