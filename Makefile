# make demo     build, install into .venv and run the main example (quick setting)
# make test     the same environment, then the whole test suite
# make wheel    a wheel in dist/
# make dev      compile what changed into python/fastpe, for running from the source folder (PYTHONPATH=python)
# make clean    remove what was built; make distclean removes .venv too
#
# Variables: PYTHON (the interpreter to start from), PIP_ARGS (added to every pip install, for instance an index with
# CPU builds of torch), PYTEST_ARGS, DEMO_ARGS, DEV_ISAS (for make dev: compile "avx2;generic" only, say), DEV_CUDA (for
# make dev: ON compiles the CUDA kernels too), DEV_EMULATE_AVX512 (for make dev: ON compiles the AVX-512 kernels for a processor
# without AVX-512, see csrc/emu/avx512.h), BIN (the folder of the python that make dev uses).

PYTHON ?= python3
VENV := .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -q -n 2
DEMO_ARGS ?= --quick

DEV_CUDA ?= OFF
DEV_EMULATE_AVX512 ?= OFF

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE \
  $(shell find csrc python/fastpe -type f ! -name '*.so' ! -name '*.pyc')

# The environment alone decides what is imported.
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: all demo test wheel dev clean distclean
all: $(VENV)/.installed

demo: $(VENV)/.installed $(VENV)/.demo
	$(BIN)/python examples/extrapolation.py $(DEMO_ARGS)

test: $(VENV)/.installed $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

wheel: $(VENV)/.build
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

# No dependency on $(VENV): BIN may name another environment.
dev:
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE="$(abspath $(BIN))/python" "-DFASTPE_CUDA=$(DEV_CUDA)" "-DFASTPE_EMULATE_AVX512=$(DEV_EMULATE_AVX512)" $(if $(DEV_ISAS),"-DFASTPE_ISAS=$(DEV_ISAS)")
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/dev
	PATH="$(abspath $(BIN)):$$PATH" cmake --install build/dev --prefix python

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastpe needs Python 3.10 or later: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "fastpe needs a C++20 compiler, g++ 11 or clang++ 14 and later" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no working venv module (Debian, Ubuntu: install python3-venv)" >&2; rm -rf $(VENV); exit 1; }
	@touch $@

# One mark per requirements file. pip itself leaves alone what is already there.
$(VENV)/.build: requirements/build.txt $(VENV)/.created
$(VENV)/.demo: requirements/demo.txt requirements/build.txt $(VENV)/.created
$(VENV)/.test: requirements/test.txt requirements/demo.txt requirements/build.txt $(VENV)/.created
$(VENV)/.build $(VENV)/.demo $(VENV)/.test:
	$(PIP) install $(PIP_ARGS) -r $<
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.build
	$(PIP) install $(PIP_ARGS) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

clean:
	rm -rf build dist python/fastpe/*.so .pytest_cache .hypothesis $(VENV)/.installed

distclean: clean
	rm -rf $(VENV)
