# Everything runs in .venv, which the first target makes. PYTHON picks the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
# Two files of tests at a time, each on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test unit integration lint style format docs examples clean

quickstart: .venv  ## the whole line on a small real model, on a CPU
	rm -rf build && $(BIN)/pip install --quiet '.[cpu]'
	$(BIN)/lorasb quickstart --out quickstart

test: style  ## what CI runs; mypy beside the tests
	mkdir -p build
	$(BIN)/mypy > build/mypy.log 2>&1 & $(PYTEST) tests integration; tests=$$?; \
	wait $$!; types=$$?; cat build/mypy.log; exit $$((tests || types))

unit: install-test  ## the fast tests alone
	$(PYTEST) tests

integration: install-test  ## the slow tests alone: real model, vLLM, ONNX Runtime, a loopback Hub
	$(PYTEST) integration

lint: style
	$(BIN)/mypy

style: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install-test  ## docs/reference: cli.md from --help, python.md from docstrings
	$(BIN)/python docs/make_reference.py

examples: install-test  ## docs/examples/: cards as a push publishes them
	$(BIN)/python -m docs.make_card_examples

.PHONY: install-test
install-test: .venv
	rm -rf build && $(BIN)/pip install --quiet --no-compile '.[cpu,test]'

.venv:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build *.egg-info quickstart
