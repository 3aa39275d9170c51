#!/bin/sh
# One command on a machine with an NVIDIA GPU: the device tests, then steps, memory and sampling of every method.
# In ten minutes; `benchmarks/gpu.sh --minutes 30` measures more, and `--help` says what else can be chosen.
cd "$(dirname "$0")/.." || exit
[ -x .venv/bin/python ] && : "${PYTHON:=.venv/bin/python}"  # where the Makefile puts it
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
