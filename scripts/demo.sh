#!/usr/bin/env bash
# The main job on the reference model that ships with the package. Sets up .venv first. Arguments go to pcr-export.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e .
.venv/bin/pcr-export tiny-sdxl --bits w8a8 --out engines/ "$@"
.venv/bin/pcr-export generate engines/tiny-sdxl-w8a8 "a red circle above a blue square" --seed 1 -o engines/example.png
