# make demo   watch a diffusion model forget a training image; ends with the report to open
# make test   the whole test-suite
# Both set up .venv on a fresh machine: python3 >= 3.10 with venv, package registry; no GPU, no root.
# TORCH="torch==X" picks another torch.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH ?= $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.PHONY: demo test slow-test lint bench install clean

demo: $(VENV)/.installed
	$(BIN)/fastunlearn demo --output out/demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --maxschedchunk 48

slow-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest bench --benchmark-only

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

install: $(VENV)/.installed

# torch goes in first and alone: a plain `torch` from another package's requirements would bring several GB of
# CUDA libraries.
ifneq ($(origin TORCH),file)
.PHONY: $(VENV)/.torch
endif
IS_NEW_ENOUGH := import sys, torch; v = torch.__version__.split("+")[0].split(".");
IS_NEW_ENOUGH += sys.exit((int(v[0]), int(v[1])) < (2, 11))
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null \
	  && [ "$(origin TORCH)" = "file" ] || $(PIP) install --quiet "$(TORCH)"
	$(BIN)/python -c 'import torch; print("torch=="+torch.__version__.split("+")[0])' > $@.constraint
	sed '/^torch==/d' constraints.txt > $@.rest
	cat $@.constraint $@.rest > $@.constraints && rm $@.constraint $@.rest
	touch $@

BUILD := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

$(VENV)/.installed: $(VENV)/.torch $(BUILD)
	$(PIP) install --quiet -c $(VENV)/.torch.constraints -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(BUILD)
	$(PIP) install --quiet -c $(VENV)/.torch.constraints -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info fastunlearn/_C*.so
