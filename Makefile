# Each target works from a bare clone. All set-up goes into .venv; `make clean` takes it away again.

PYTHON ?= python3
VENV := .venv
LINT_VENV := .venv-lint
VENV_PYTHON := $(VENV)/bin/python
WHEELS := build/wheels

# Each is written when its step is complete, so that an interrupted step is done again.
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
# There while pip changes .venv. Found at the start, it tells of a half-written .venv.
UNFINISHED := $(VENV)/.unfinished

# Directories are listed as well: their dates tell that a file was removed or renamed.
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
  $(shell find csrc python -name __pycache__ -prune -o -print)

# Start afresh from a half-written .venv, and from one whose Python has left the machine.
VENV_STATE := $(shell test ! -e $(UNFINISHED) && $(VENV_PYTHON) -c '' 2>/dev/null && echo sound)
ifneq ($(VENV_STATE),sound)
.PHONY: $(CREATED)
endif

.DEFAULT_GOAL := help
.PHONY: help mnist test lint format wheels bounds docs fuzz soak sanitize other-cpus free-threaded bench performance gpu-check clean

help:
	@echo "make mnist   train the article's MNIST network on the fast layers;"
	@echo "             ARGS passes options: make mnist ARGS='--layers both --epochs 2'"
	@echo "make test    run the tests; ARGS passes options to pytest, WORKERS=0 runs them in"
	@echo "             one process, as debuggers want it"
	@echo "make docs    build the documentation's pages in build/docs"
	@echo "make lint    ruff, mypy, clang-format and clang-tidy; make format rewrites the sources"
	@echo "make wheels  build and try a wheel for every Python found, in dist/"
	@echo "make bounds  run tests with the oldest and the newest NumPy, TensorFlow and Keras"
	@echo "make fuzz    compare 100,000 random problems with float64; ARGS passes options"
	@echo "make soak    train and infer for 30 minutes and watch the memory; ARGS passes options"
	@echo "make sanitize   run the library's stress test under ASan, UBSan and TSan"
	@echo "             and between guard pages; ARGS passes options"
	@echo "make other-cpus   run on Arm and on x86-64 processors without AVX-512 and AVX, in QEMU"
	@echo "make free-threaded PYTHON=python3.13t   build and test without Python's global lock"
	@echo "make bench   run the benchmarks; ARGS passes options to pytest"
	@echo "make performance   measure every suite beside other libraries (large downloads)"
	@echo "             and write docs/performance.md"
	@echo "make gpu-check   for a machine with an NVIDIA GPU: build and test the CUDA kernels,"
	@echo "             time them beside cuDNN, write a report to send back"
	@echo "make clean   remove .venv and everything that was built"
	@echo
	@echo "Needs Python 3.10 or newer (one other than python3: make PYTHON=...) and a"
	@echo "C++20 compiler. The first run sets up .venv, for which it downloads TensorFlow."

mnist: $(INSTALLED)
	@$(VENV_PYTHON) -m fastconv mnist $(ARGS)

# Most tests keep one core busy. A file of tests stays in one process, for what its tests share; in the
# order of their names, in which the longest single test does not come last.
WORKERS ?= 2

test: $(INSTALLED)
	$(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

docs: $(INSTALLED)
	$(VENV_PYTHON) -m sphinx -W --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

# Their tools have an environment of their own: TensorFlow is not needed.
$(LINT_VENV)/.installed: pyproject.toml
	@tools/check_machine.sh $(PYTHON)
	@$(PYTHON) -m venv --clear $(LINT_VENV)
	@$(LINT_VENV)/bin/python tools/extra.py lint | \
	  xargs -d '\n' $(LINT_VENV)/bin/python -m pip install --quiet
	@touch $@

lint: $(LINT_VENV)/.installed
	@LINT_VENV=$(LINT_VENV) tools/lint.sh $(ARGS)

format: $(LINT_VENV)/.installed
	@LINT_VENV=$(LINT_VENV) tools/lint.sh format

bounds:
	@PYTHON=$(PYTHON) tools/check_bounds.sh $(ARGS)

wheels:
	@tools/build_wheels.sh $(ARGS)

fuzz: $(INSTALLED)
	cd tests && ../$(VENV_PYTHON) fuzz.py $(ARGS)

soak: $(INSTALLED)
	cd tests && ../$(VENV_PYTHON) soak.py $(ARGS)

sanitize: $(INSTALLED)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/sanitize.sh $(ARGS)

other-cpus: $(INSTALLED)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/check_other_cpus.sh $(ARGS)

# An environment of its own, in build/free-threaded.
free-threaded:
	@tools/check_free_threaded.sh $(PYTHON) $(ARGS)

bench: $(INSTALLED)
	$(VENV_PYTHON) -m pytest bench $(ARGS)

performance: $(INSTALLED)
	@set -- $(WHEELS)/*.whl && $(VENV_PYTHON) -m pip install --quiet "$$1[bench]"
	$(VENV_PYTHON) -m fastconv bench --report docs/performance.md $(ARGS)

# A virtual environment of its own, in build/gpu-check.
gpu-check:
	@$(PYTHON) tools/gpu_check.py $(ARGS)

clean:
	rm -rf $(VENV) $(LINT_VENV) build dist .pytest_cache .hypothesis .benchmarks .ruff_cache .mypy_cache
	find csrc python tests bench examples tools -name __pycache__ -prune -exec rm -rf {} +

$(CREATED):
	@tools/check_machine.sh $(PYTHON)
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# After the first time, pip would mostly list what is there already. To compile every module of
# TensorFlow and JAX takes a minute; Python compiles those that are imported, and keeps them.
unexport PYTHONDONTWRITEBYTECODE
PIP = --no-compile $(if $(wildcard $(INSTALLED)),--quiet)

# The wheel is built before anything is installed: an error of the compiler costs no download.
$(INSTALLED): $(CREATED) $(SOURCES)
	@echo "Building fastconv (with two cores this takes some five minutes)"
	@rm -rf $(WHEELS)
	@$(VENV_PYTHON) -m pip wheel --no-deps --wheel-dir $(WHEELS) .
	@touch $(UNFINISHED)
	@echo "Installing fastconv, TensorFlow and the test tools into $(VENV)"
	@$(VENV_PYTHON) -m pip install $(PIP) --force-reinstall --no-deps $(WHEELS)/*.whl
	@set -- $(WHEELS)/*.whl && $(VENV_PYTHON) -m pip install $(PIP) "$$1[tensorflow,test]"
	@mv $(UNFINISHED) $@
