# The common jobs. PYTHON is the interpreter of an environment in which `make install` may install.
PYTHON ?= python

.PHONY: install lint test bench

install:
	$(PYTHON) -m pip install -e '.[train,test]'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Twice, because Triton decides when kernels are defined whether they are compiled or interpreted.
test: lint
	$(PYTHON) -m pytest --durations=15
	TRITON_INTERPRET=1 $(PYTHON) -m pytest tests/triton --durations=5

bench:
	$(PYTHON) -m pytest benchmarks --benchmark-only
