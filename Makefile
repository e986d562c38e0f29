# Nothing here needs an activated environment: every target makes the one it uses.

SHELL := bash
.DEFAULT_GOAL := help
PYTHON ?= python3
RUN := .venv/bin/python -P
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The models of the tests are tiny: threads would only wait for each other, so processes share out the files instead.
PYTEST := -m pytest -n 2 --dist loadscope
test test-all test-min test-cpp models quality resources check: export OMP_NUM_THREADS ?= 1

.PHONY: help demo train quality test test-all test-min test-cpp models resources check fmt types clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  \1|\2/p' Makefile | column -t -s '|'

demo: .venv/.installed  ## compress a small model's cache and show what was kept
	.venv/bin/kvfx demo

train: .venv/.installed  ## train the demo's model: two cores, about an hour; it goes on where it was cut short
	cd benchmarks && ../.venv/bin/python -m retriever

test: .venv/.installed  ## run the tests, without those marked slow
	$(RUN) $(PYTEST)

test-all: .venv/.installed  ## run all tests
	$(RUN) $(PYTEST) -m ""

test-min: .venv-min/.installed  ## run the tests with the oldest supported transformers
	.venv-min/bin/python -P $(PYTEST)

test-cpp: .venv/.installed  ## build examples/cpp, and compare its tokens with Python's
	$(RUN) -m pytest -m "" -k c_plus_plus tests/test_package.py

models: .venv/.installed  ## write docs/models.md: what each family of models was found to do
	KVFX_WRITE_MODELS=1 $(RUN) -m pytest -m "" -k page_of_models tests

quality: .venv/.installed  ## answer what is missing of benchmarks/results/quality.jsonl.gz, and write docs/quality.md
	.venv/bin/python benchmarks/quality.py

resources: .venv/.installed  ## write benchmarks/results/kernel_resources.csv: what kernels take of each chip
	KVFX_WRITE_RESOURCES=1 $(RUN) -m pytest -m "" -k of_every_size_compile tests

check: .venv/.installed types  ## lint, formatting, types, import direction
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	cd .types && ../.venv/bin/mypy --config-file ../pyproject.toml
	$(RUN) -m pytest -q tests/test_architecture.py

fmt: .venv/.installed  ## format, and fix what ruff can fix
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

types:  ## lay the three rooms out as the one package kvfx, which is where mypy looks
	@rm -rf .types && mkdir -p .types/kvfx
	@ln -s $(addprefix ../../,$(wildcard kvfx/*.py kvfx/py.typed) kvfx/demo passes kernels) .types/kvfx/

clean:  ## remove environments, caches and build outputs
	rm -rf .venv .venv-min .types .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One rule for both environments; it runs again only when what they are made from changes.
.venv-min/.installed: private PINS := 'transformers==5.17.*'
%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install -qq -c constraints.txt -e '.[dev]' $(PINS)
	@touch $@
