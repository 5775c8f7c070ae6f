#!/usr/bin/env bash
# Measures reslora on the GPU of this machine: numerics, then speed; writes results/gpu.json.
#
#   bash benchmarks/gpu.sh        # under 8 minutes after the build
#
# Uses the python at hand where it has torch with CUDA, and installs there only what is absent; else
# makes .venv-gpu. Builds the CUDA kernels where nvcc is found; without it the op takes its ATen form,
# and the file says so.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # `sh` may name another shell
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program=gpu.sh logs=$PWD/build
# shellcheck source=../tests/setup.sh
source tests/setup.sh
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1 && ! have nvidia-smi; then
  die "a GPU of NVIDIA must be there; got none (no nvidia-smi, no /dev/nvidia0)"
fi
require_packages use
check_folder "$logs" 0 "a clone of your own"
sees_gpu() { "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
lacking() { "$python" tests/lacking.py "$@"; }
python=$(find_python)
absent=torch
if sees_gpu; then absent=$(requirements build example | lacking); fi
if [[ $absent != *torch* ]]; then
  # That torch is the one to measure: nothing that is there is replaced.
  say "taking torch and all else that $(command -v "$python") has"
  if [[ -n $absent ]]; then
    say "installing what is absent there: ${absent//$'\n'/ }"
    bounds | lacking --any-version >"$logs/bounds.txt"
    printf '%s\n' "$absent" >"$logs/requirements.txt"
    "$python" -m pip install --quiet -c "$logs/bounds.txt" -r "$logs/requirements.txt" ||
      die "pip could not install what is absent; its words stand above"
  fi
else
  make_environment .venv-gpu example
  python=.venv-gpu/bin/python
  sees_gpu || die "torch must see a GPU; got none"
fi
"$python" -m pip install --quiet --no-build-isolation --no-deps .
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 9 --log-file benchmarks/results/sanitizer.txt \
    "$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import bench_gpu
bench_gpu.CHECKED = bench_gpu.CHECKED[:2]
bench_gpu.numerics("cuda")' || echo "[gpu.sh] compute-sanitizer found errors: results/sanitizer.txt" >&2
fi
exec "$python" benchmarks/bench_gpu.py --seconds 420 "$@"
