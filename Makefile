# Every target sets itself up: it needs Python 3.12, make and a compiler, and no activation.
#
#   make quickstart   a tiny model learns to reverse digit strings
#   make test         everything that can be checked without a GPU
#   make lint | slow | chaos | bench
#   make clean        remove what these made, runs excepted

PYTHON ?= python3.12
NOX := .venv/bin/nox

.PHONY: quickstart test lint slow chaos bench clean

quickstart: $(NOX)
	$(NOX) --session quickstart

test: $(NOX)
	$(NOX)

lint slow chaos bench: $(NOX)
	$(NOX) --session $@

clean:
	rm -rf .nox .venv dist .hypothesis .mypy_cache .pytest_cache .ruff_cache examples/*/data
	find . -name __pycache__ -prune -exec rm -rf {} +

# nox runs the sessions, uv fills their environments from one shared cache.
$(NOX): constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; say make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up nox and uv in .venv"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "nox>=2025.5,<2027" "uv>=0.8,<0.14"
	@touch $@
