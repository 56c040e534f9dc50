#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in one command and without a network:
#
#     scripts/gpu_check.sh OUT [PYTHON]
#
# builds the package with its CUDA library, runs the conformance kernels, the CUDA tests, compute-sanitizer on a few of
# them and the benchmarks, and writes OUT/gpu_check.json with device, versions, every result and every figure. PYTHON
# (default: python3) needs torch with CUDA, numpy, pytest, hypothesis, pybind11, tqdm, cmake and ninja; nvcc is on the PATH.
# Exit status 0: every step passed.
#
# FASTPE_GPU_STEPS picks steps (default "build conformance tests sanitizer benchmarks").
set -uo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ]; then
  sed -n '2,12p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
exec "${2:-python3}" scripts/gpu_check.py "$1"
