#!/usr/bin/env bash
# Checks everything: lint, format, types, tests. Sets up .venv first. Arguments go to pytest (e.g. -m slow, or -n 0 for one process).
# With --lowest: the wheel with the lowest versions of everything that it needs, in environments of its own (check_lowest.py).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --lowest ]; then
    exec python3 scripts/check_lowest.py "${@:2}"
fi
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
.venv/bin/mypy >"$types" 2>&1 & # beside the tests: without its cache it takes one core for a minute
code=0
.venv/bin/python -m pytest -n auto "$@" || code=$?
wait $! || code=$?
cat "$types"
exit $code
