# `make env` once, then `make demo` and `make test`. Needs python3 (3.10 or newer) and a PyPI registry; uv is used if there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# Few steps and small crops, so that the demo ends in minutes, and one thread: with two beside other work, threads wait for
# each other and it takes four times as long. `make demo DEMO_FLAGS=` runs with the defaults.
DEMO_FLAGS ?= --num_calib 4 --crops_per_image 1 --crop 128 --set joint_iters=4 --threads 1
# Two processes of one thread each: nothing here is large enough for two threads to help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
# An index with builds of torch and torchvision to take in place of PyPI's, which are for CUDA on Linux: 5 GB where a CPU
# needs 0.6, e.g. `make env TORCH_INDEX=https://download.pytorch.org/whl/cpu`. Where it has no pair of them that fits, PyPI's come.
TORCH_INDEX ?=
TORCH = [ -z '$(TORCH_INDEX)' ] || (export PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS=; \
	$(call INSTALL,--index-url '$(TORCH_INDEX)' 'torch>=2.4' torchvision)) || \
	echo "note: no torch and torchvision that fit each other at $(TORCH_INDEX); the usual index is asked" >&2
INSTALL = if command -v uv >/dev/null 2>&1; then uv pip install --quiet --python $(BIN)/python $(1); \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check $(1); fi

.PHONY: env demo test test-all lint format ide docs tables

env: $(STAMP)

# The project is installed editable. `venv` needs ensurepip, which some distributions ship apart: uv does without it.
$(STAMP): setup.py pyproject.toml $(wildcard integer/*.[ch])
	@if command -v uv >/dev/null 2>&1; then \
	    { [ -x $(BIN)/python ] || uv venv --quiet --python $(PYTHON) $(VENV); } && { $(TORCH); } && \
	    uv pip install --quiet --python $(BIN)/python --reinstall-package licq --refresh-package licq --editable '.[test]'; \
	else \
	    { [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || \
	      { echo "error: $(PYTHON) -m venv failed; install python3-venv or uv" >&2; rm -rf $(VENV); exit 2; }; } && { $(TORCH); } && \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'; \
	fi
	@touch $@

demo: env
	$(BIN)/python main_ptq.py --arch lu2022 --w_bits 8 --a_bits 8 --loss rd --eval photos --out runs/demo $(DEMO_FLAGS)
	@echo
	@echo "Shown: what 8 bits cost four trained lu2022 codecs on three photographs. bpp of the quantized ones counts files that the"
	@echo "integer program wrote and decoded; plain is rounding to nearest. Few steps and small crops: without them it costs less."
	@echo "Next:  open runs/demo/report.html"
	@echo "       $(BIN)/python main_ptq.py --arch lu2022 --out runs/lu2022        the defaults, on Kodak where it is found"
	@echo "       $(BIN)/python main_eval.py encode PHOTO -o photo.licq --model runs/demo --quality 5"
	@echo "       docs/quickstart.md, and docs/your-codec.md for a codec of your own"

test: env
	$(PYTEST) -m "not slow"

test-all: env
	$(PYTEST)

# Tools of developers: ruff, pyright, clang-format, pre-commit, mkdocs.
$(STAMP)-dev: $(STAMP)
	@$(call INSTALL,--editable '.[dev]')
	@touch $@

lint: $(STAMP)-dev ide
	$(BIN)/ruff check --quiet --output-format concise .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/clang-format --dry-run -Werror integer/*.[ch]
	$(BIN)/pyright

format: $(STAMP)-dev
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i integer/*.[ch]

# Links by which pyright and IDEs find licq.<room> in a checkout.
ide: env
	@$(BIN)/python .ci/ide_links.py

# What is open or old of the results' tables, two runs at a time; LICQ_DATA names the folder with kodak/, clic/ and checkpoints/.
# `make tables TABLES_FLAGS="--hours 10"`; CONTRIBUTING.md says more.
TABLES_FLAGS ?=
tables: env
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tables.py --workers 2 $(TABLES_FLAGS)

# The documentation as a site, in site/.
docs: $(STAMP)-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"
