# Every target sets up its own environment first: see tools/setup_env.sh for VENV, PYTHON and
# TORCH_INDEX_URL. ARGS goes to the program run: make throughput ARGS="--preset 3.9b --batch 16"
VENV ?= .venv
READY := $(VENV)/ready
export VENV PYTHON TORCH_INDEX_URL

.PHONY: throughput test lint clean

throughput: $(READY)
	$(VENV)/bin/python bench/throughput.py $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(READY): tools/setup_env.sh pyproject.toml setup.py
	sh tools/setup_env.sh
	touch $@
