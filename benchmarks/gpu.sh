#!/usr/bin/env bash
# Measures reslora on the GPU of this machine: numerics, then speed; writes results/gpu.json.
#
#   bash benchmarks/gpu.sh        # under 8 minutes after the build
#
# Uses the python at hand where it has torch with CUDA, else makes .venv-gpu. Builds the CUDA kernels
# where nvcc is found; without it the op takes its ATen form, and the file says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program=gpu.sh logs=$PWD/build
# shellcheck source=../tests/setup.sh
source tests/setup.sh
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1 && ! have nvidia-smi; then
  die "a GPU of NVIDIA must be there; got none (no nvidia-smi, no /dev/nvidia0)"
fi
require_packages use
mkdir -p "$logs"
# The torch at hand, where it sees the GPU, is the one to measure: it is not replaced.
python=$(find_python)
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  make_environment .venv-gpu example
  python=.venv-gpu/bin/python
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    die "torch must see a GPU; got none"
else
  RESLORA_TORCH=torch bounds >"$logs/bounds.txt"
  # shellcheck disable=SC2046  # a list of words
  "$python" -m pip install --quiet -c "$logs/bounds.txt" $(requirements build example | tr -d ' ')
fi
"$python" -m pip install --quiet --no-build-isolation --no-deps .
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 9 --log-file benchmarks/results/sanitizer.txt \
    "$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import bench_gpu
bench_gpu.CHECKED = bench_gpu.CHECKED[:2]
bench_gpu.numerics("cuda")' || echo "[gpu.sh] compute-sanitizer found errors: results/sanitizer.txt" >&2
fi
exec "$python" benchmarks/bench_gpu.py --seconds 420 "$@"
