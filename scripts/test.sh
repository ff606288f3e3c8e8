#!/usr/bin/env bash
# Everything CI checks: ruff (lint, format), mypy --strict, pytest. Arguments go to pytest: scripts/test.sh tests/test_gptq.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/mypy scripts
# the whole suite on two cores: files side by side by name, each file's tests in order
if [ $# -eq 0 ]; then
    set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest -q "$@"
