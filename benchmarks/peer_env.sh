#!/usr/bin/env bash
# Makes .venv-mergekit: mergekit, the peer that the benchmarks and the peer tests compare with, in
# an environment of its own, so that its dependencies and taskvec's never have to agree. Only torch
# is held: the version of constraints.txt (there as a CPU build where one is at hand).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MERGEKIT=0.1.5
TORCH=2.13.0
VENV=.venv-mergekit
STAMP=$VENV/.mergekit-$MERGEKIT-torch-$TORCH

[[ -e $STAMP ]] && exit 0

echo "making $VENV: mergekit $MERGEKIT, torch $TORCH (a few minutes, once)" >&2
rm -rf "$VENV"
"${PYTHON:-python3}" -m venv "$VENV"
printf 'torch==%s\n' "$TORCH" > "$VENV/constraints.txt"
# Both replace what make exports; older pips read the first one for build environments too.
export PIP_CONSTRAINT="$PWD/$VENV/constraints.txt"
export PIP_BUILD_CONSTRAINT="$PIP_CONSTRAINT"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$VENV/bin/python" -m pip install -qq "mergekit==$MERGEKIT" "torch==$TORCH"
"$VENV/bin/mergekit-yaml" --help > /dev/null
touch "$STAMP"
