#!/usr/bin/env bash
# Measures reslora on the GPU of this machine: numerics, then speed; writes results/gpu.json.
#
#   bash benchmarks/gpu.sh        # under 8 minutes after the build
#
# Uses the python at hand where it has torch with CUDA, else makes .venv-gpu. Builds the CUDA kernels
# where nvcc is found; without it the op takes its ATen form, and the file says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1 && ! command -v nvidia-smi >/dev/null; then
  echo "[gpu.sh] a GPU of NVIDIA must be there; got none (no nvidia-smi, no /dev/nvidia0)" >&2
  exit 1
fi
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$python" -m venv .venv-gpu
  python=.venv-gpu/bin/python
  "$python" -m pip install --quiet torch
fi
"$python" -c 'import torch, sys
sys.exit(None if torch.cuda.is_available() else "[gpu.sh] torch must see a GPU; got none")'
"$python" -m pip install --quiet "scikit-build-core>=0.10" cmake ninja peft transformers tqdm matplotlib
"$python" -m pip install --quiet --no-build-isolation .
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 9 --log-file benchmarks/results/sanitizer.txt \
    "$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import bench_gpu
bench_gpu.CHECKED = bench_gpu.CHECKED[:2]
bench_gpu.numerics("cuda")' || echo "[gpu.sh] compute-sanitizer found errors: results/sanitizer.txt" >&2
fi
exec "$python" benchmarks/bench_gpu.py --seconds 420 "$@"
