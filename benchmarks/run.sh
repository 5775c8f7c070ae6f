#!/usr/bin/env bash
# Makes every result file that this machine can, then the README's tables and the plots.
#
#   bash benchmarks/run.sh            # hours; cells that exist already are skipped
#   bash benchmarks/run.sh --report   # only tables and plots from the results that are there
#
# Uses the virtual environment of tests/run.sh. Run it on a machine that does nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=${RESLORA_VENV:-$PWD/.venv}/bin:$PATH
if [[ ${1:-} != --report ]]; then
  for dtype in float32 bfloat16; do
    for rank in 16 8 64; do
      python benchmarks/bench_grid.py --ranks "$rank" --dtype "$dtype"
    done
  done
  python benchmarks/bench_layer.py --output results/layer_2048x768.json
  python benchmarks/bench_layer.py --tokens 128 --in 384 --out 384 --rounds 100 \
    --output results/layer_128x384.json
  python benchmarks/bench_step.py
  python benchmarks/bench_growth.py
  python benchmarks/bench_file_merge.py --folder "${TMPDIR:-/var/tmp}"
  if command -v cmake >/dev/null && [[ -e /usr/include/benchmark/benchmark.h ]]; then
    cmake --preset bench >/dev/null && cmake --build --preset bench >/dev/null
    build/bench/benchmarks/bench_adapt --benchmark_out=benchmarks/results/adapt_cpp.json \
      --benchmark_out_format=json
  fi
fi
python benchmarks/plot_speed.py
python benchmarks/merge_summary.py >/dev/null
python benchmarks/readme_table.py
python benchmarks/paper/report.py
