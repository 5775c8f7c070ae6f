#!/usr/bin/env bash
# Builds and measures reslora on the GPU of this machine, within a budget of minutes.
#
#   bash benchmarks/gpu.sh --minutes 9 --output FOLDER
#   bash benchmarks/gpu.sh --device cpu --scale 16 --minutes 2   # tries the script itself
#
# The most valuable comes first (gpu/plan.py has the order): the build, doctor, numerics, device time
# and GB/s of every kernel, the speed table, the GPU tests; from 15 minutes on a whole Llama, more
# shapes and torch.compile; from 20 on CUDA graphs and CUDA's own tools. FOLDER (results/gpu) gets
# gpu.json, written whole after every case, log.txt, and a text for each tool.
#
# Uses the python at hand where it has torch with CUDA, and asks pip only for what is absent there, so
# that it needs no network where torch, peft, transformers, pytest and cmake are; what pip cannot
# install is left out. Else it makes .venv-gpu, whose installation no budget counts. Builds the CUDA
# kernels where nvcc is found; without it the op takes its ATen form, and gpu.json says so.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # `sh` may name another shell
set -euo pipefail
started=${EPOCHREALTIME/,/.}
own_path=${PYTHONPATH:-} base=$PWD  # setup.sh unsets it
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program=gpu.sh logs=$PWD/build
# shellcheck source=../tests/setup.sh
source tests/setup.sh
device=cuda
case " $* " in *" --device cpu "* | *" --device=cpu "*) device=cpu ;; esac
if [[ $device == cuda ]] && ! ls /dev/nvidia[0-9]* >/dev/null 2>&1 && ! have nvidia-smi; then
  die "a GPU of NVIDIA must be there; got none (no nvidia-smi, no /dev/nvidia0)"
fi
check_folder "$logs" 0 "a clone of your own"
sees_device() {
  "$python" -c "import torch, sys; sys.exit('$device' == 'cuda' and not torch.cuda.is_available())" \
    2>/dev/null
}
lacking() { "$python" tests/lacking.py "$@" 2>/dev/null; }  # it needs pip's modules
# What a build needs; not what only a new environment needs.
if [[ -n $(missing_packages use | grep -v -e '-venv$') ]]; then require_packages use; fi
python=$(find_python) absent=torch
export PYTHONPATH=$own_path
if sees_device; then absent=$(requirements gpu | lacking) || absent=""; fi
if [[ $absent != *torch* ]]; then
  # That torch is the one to measure: nothing that is there is replaced.
  say "taking torch and all else that $(command -v "$python") has"
  if [[ -n $absent ]]; then
    say "installing what is absent there: ${absent//$'\n'/ }"
    bounds | lacking --any-version >"$logs/bounds.txt"
    printf '%s\n' "$absent" >"$logs/requirements.txt"
    "$python" -m pip install --quiet --retries 1 --timeout 10 -c "$logs/bounds.txt" \
      -r "$logs/requirements.txt" ||
      say "pip could not install that, its words say why; what needs it is left out"
  fi
else
  unset PYTHONPATH
  require_packages use
  make_environment .venv-gpu gpu
  python=.venv-gpu/bin/python started=${EPOCHREALTIME/,/.}
  sees_device || die "torch must see a GPU; got none"
fi
CMAKE_BUILD_PARALLEL_LEVEL=$(compile_jobs) exec "$python" benchmarks/gpu/run.py \
  --started "$started" --base "$base" "$@"
