#!/usr/bin/env bash
# The demo: makes .venv where it is missing, installs qtool, converts the shipped model and prints what it cost.
# Offline after the installation. Another recipe: scripts/demo.sh recipes/awq.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment
exec .venv/bin/qtool run "${@:-recipes/demo.yaml}"
