# Each target does all of its own set-up on a fresh machine; CI calls exactly these.

.PHONY: demo test check bench docs

BIN := .venv/bin
READY := .venv/.ready

demo: $(READY)
	$(BIN)/litchi demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house tests/laws

bench: $(READY)
	@for script in $(filter-out bench/__init__.py bench/row.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

docs: $(READY)
	@for script in $(sort $(wildcard docs/tour/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	$(BIN)/python -m pytest tests/house/test_docs.py

# The stamp is written last, so that an interrupted install is done again.
$(READY): pyproject.toml
	@test -x $(BIN)/pip || { \
	  for python in python3 python3.13 python3.12 python3.11; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=; \
	  done; \
	  test -n "$$python" || { echo "error: litchi needs Python 3.11 or newer on the PATH" >&2; exit 2; }; \
	  $$python -m venv .venv; \
	}
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[rooms,serve,board,films,s3,dev]'
	@touch $@
