#!/usr/bin/env bash
# Lint, types and tests: ruff (lint, format), mypy --strict, pytest without the slow ones. --all: with them, as CI does.
# Other arguments go to pytest: scripts/test.sh tests/test_gptq.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/mypy scripts
# the whole suite on two cores: files side by side by name, each file's tests in order
case "${1:-}" in
    "") set -- -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" ;;
    --all) set -- -n 2 --dist loadfile --no-loadscope-reorder ;;
esac
unset PYTHONDONTWRITEBYTECODE  # or each worker and each child would compile the same modules again
exec .venv/bin/python -m pytest -q "$@"
