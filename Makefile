# The common jobs. PYTHON is the interpreter of an environment in which `make install` may install.
PYTHON ?= python
# Processes that run tests at the same time, a thread each: threads of several processes would wait for one another's
# turn. A file's tests stay in one process, so that they share fixtures.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install lint test tests docs test-oldest bench

install:
	$(PYTHON) -m pip install -e '.[train,test,docs]'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint tests

# Twice, because Triton decides when kernels are defined whether they are compiled or interpreted. The interpreted ones
# share no fixtures, and most of them stand in one file.
tests:
	$(PYTEST) --durations=15
	TRITON_INTERPRET=1 $(PYTEST) --dist worksteal tests/triton --durations=5

# The documentation site, in build/docs.
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

# All tests with the oldest torch that is supported, and its Triton, whose interpreter knows no newer NumPy.
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install 'torch==2.11.*' 'numpy<2.4' -e '.[train,test]'
	PATH="$(CURDIR)/build/oldest/bin:$$PATH" $(MAKE) tests PYTHON=python

bench:
	$(PYTHON) -m pytest benchmarks --benchmark-only
