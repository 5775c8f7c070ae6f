#!/usr/bin/env bash
# Installs what is missing, builds once, runs every style check and every test, prints a summary.
#
#   bash tests/run.sh          # what each change must pass
#   bash tests/run.sh --full   # also the tests marked `full`, packaging and header checks among them
#
# The last line is `N passed, N failed, N skipped`, summed over ctest and pytest. The exit code is 0
# only if nothing failed and no test was skipped for a reason that tests/summary.py does not list.
#
# RESLORA_VENV   folder of the virtual environment (default: .venv here), which takes about 8 GB
# setup.sh beside this file lists the variables that change what is installed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # `sh` may name another shell
set -euo pipefail
program=run.sh
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$repository"
venv=${RESLORA_VENV:-$repository/.venv}
logs=$repository/build
full=0
for argument in "$@"; do
  case $argument in
    --full) full=1 ;;
    *) echo "run.sh: the only option is --full; got $argument" >&2; exit 2 ;;
  esac
done
# The C++ tests take more shapes with it.
if ((full)); then export RESLORA_FULL=1; else unset RESLORA_FULL; fi
export TOKENIZERS_PARALLELISM=false

# ccache: shared by all checkouts where it may be, inside this one where it may not.
export CCACHE_BASEDIR=$repository CCACHE_NOHASHDIR=1
ccache_folder=${CCACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/ccache}
if ! { mkdir -p "$ccache_folder" && [[ -w $ccache_folder ]]; } 2>/dev/null; then
  export CCACHE_DIR=$repository/build/ccache
fi

section() { printf '== %s\n' "$*"; }

build_folder() {
  python -c 'import sys, sysconfig
tag = "cp%d%d" % sys.version_info[:2]
print(f"build/{tag}-{tag}-" + sysconfig.get_platform().replace("-", "_").replace(".", "_"))'
}

timings=""
# Adds the seconds since $2 to the timings, as those of $1.
note_time() { timings+="$1: $((SECONDS - $2)) s; "; }

part=$SECONDS
check_folder "$venv" "$(space_for "$venv")" RESLORA_VENV
check_folder "$logs" 0 "a clone of your own"
lock_folder "$logs"
require_packages "$( ((full)) && echo full || echo test)"
make_environment "$venv" test test-unisolated
export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
note_time install "$part"

# One build tree for the package and the C++ tests: nothing is compiled twice.
part=$SECONDS
build_reslora "$venv" \
  --config-settings=cmake.define.RESLORA_BUILD_TESTS=ON \
  --config-settings=cmake.define.RESLORA_WERROR=ON --editable .
note_time build "$part"
results=$repository/$(build_folder)/results
mkdir -p "$results"
rm -f "$results"/*.xml "$results"/gtest/*.xml "$results"/style.txt

part=$SECONDS
section "style"
style_options=()
if ((full)); then style_options+=(--headers); fi
python tests/style.py ${style_options[@]+"${style_options[@]}"} || touch "$results/style.txt"
note_time style "$part"

part=$SECONDS
section "ctest"
GTEST_OUTPUT=xml:$results/gtest/ OMP_NUM_THREADS=1 ctest --test-dir "$(build_folder)" \
  --parallel "$(compile_jobs)" --no-tests=error --output-on-failure \
  --output-junit "$results/ctest.xml" 9>&- || true
note_time ctest "$part"

part=$SECONDS
section "pytest"
selection=(-m "not full")
if ((full)); then selection=(); fi
# A file's tests share what they build, so they stay together. More threads than cores would spin.
OMP_NUM_THREADS=1 python -m pytest -q --numprocesses "$(compile_jobs)" --dist loadfile \
  --junitxml="$results/pytest.xml" ${selection[@]+"${selection[@]}"} 9>&- || true
note_time pytest "$part"

section "summary"
echo "${timings%; }"
if [[ ${RESLORA_NEWEST:-0} == 1 ]]; then python tests/constraints.py --moved; fi
exec python tests/summary.py "$results"
