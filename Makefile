# `make demo` and `make test` need Python 3.11 or later, git and make; they set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo app test cluster-test lint check coverage fuzz faults screenshots clean

# The user's two scripts with their default settings; each demo gets a folder of its own.
demo: OUT := outputs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: $(VENV)/.installed
	$(BIN)/python train_dreambooth_gsoft.py --instance_data_dir data/subjects/blue_car --class_word car --output_dir $(OUT)
	$(BIN)/python inference.py --adapter $(OUT)/adapter.safetensors --prompts_file data/prompts/demo.txt --num_images 2 --compare

# The page in the browser, until Ctrl-C; APP holds further options: make app APP="--port 8000".
app: $(VENV)/.installed-app
	$(BIN)/python -m gsoft_diffusion.app $(APP)

# Two processes of one thread each, which two cores finish sooner than one process. The tests of a file stay together.
TESTED := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed-dev
	$(TESTED)

# Comparisons on a Ray and on a Slurm cluster, which are started on this machine and ended again; see docs/cluster.md.
cluster-test: $(VENV)/.installed-cluster
	CLUSTER_TESTS=1 $(BIN)/python -m pytest tests/cluster

# Style, types, and which module may import which.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# A hundred thousand hostile adapter files; what it printed is in docs/reliability/fuzz.txt.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz_adapter.py --cases 100000

# Runs that are killed, cut off and deprived, then resumed; what it printed is in docs/reliability/faults.txt.
faults: $(VENV)/.installed-dev
	$(BIN)/python tests/faults.py

# The pictures in docs/app.md, by a real browser.
screenshots: $(VENV)/.installed-dev
	$(BIN)/python tests/page_screenshots.py

# Which lines of the package no test reaches, processes of their own included; docs/reliability/coverage.txt.
coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=
	$(BIN)/coverage report --show-missing

clean:
	rm -rf $(VENV)

# A venv that failed halfway, as without Debian's python3-venv, has a python already: it must not count as made.
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is older than Python 3.11; \
	give another: make PYTHON=<path> ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-app: $(VENV)/bin/python requirements.txt requirements-app.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/bin/python requirements.txt requirements-app.txt requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.installed $(VENV)/.installed-app

$(VENV)/.installed-cluster: $(VENV)/.installed-dev requirements-cluster.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-cluster.txt
	touch $@
