# Every target sets up its own environment first: see tools/setup_env.sh for VENV, PYTHON and
# TORCH_INDEX_URL. ARGS goes to the program run: make throughput ARGS="--preset 3.9b --batch 16"
VENV ?= .venv
READY := $(VENV)/ready
export VENV PYTHON TORCH_INDEX_URL

.PHONY: throughput report test lint ext mutants clean

throughput: $(READY)
	$(VENV)/bin/python bench/throughput.py $(ARGS)

# All figures of this machine and the report of them; without a GPU: ARGS="--folder figures"
report: $(READY)
	$(VENV)/bin/python bench/reproduce.py $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The CUDA kernels, for which the machine needs nvcc and g++ but no GPU.
ext: $(READY)
	SNAPKERNELS_BUILD=1 $(VENV)/bin/python setup.py build_ext --inplace

# Their seeded bugs, for the tests of a machine with a GPU that has no compiler or no time for it.
mutants: ext
	$(VENV)/bin/python -m snapkernels.testing.mutants

clean:
	rm -rf $(VENV) build *.egg-info snapkernels/_cuda.so

$(READY): tools/setup_env.sh pyproject.toml setup.py
	sh tools/setup_env.sh
	touch $@
