#!/usr/bin/env bash
# Installs what is missing, builds once, runs every style check and every test, prints a summary.
#
#   bash tests/run.sh          # what each change must pass
#   bash tests/run.sh --full   # also the tests marked `full`, packaging and header checks among them
#
# The last line is `N passed, N failed, N skipped`, summed over ctest and pytest. The exit code is 0
# only if nothing failed and no test was skipped for a reason that tests/summary.py does not list.
#
# RESLORA_VENV   folder of the virtual environment (default: .venv here)
# RESLORA_TORCH  what pip installs as torch (default: torch, the newest; for example torch==2.11.*)
# RESLORA_JOBS   compile jobs (default: 2; a file that reads torch's headers takes about 2 GiB)
# PYTHON         interpreter for a new virtual environment (default: the first python >= 3.11)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=$PWD
venv=${RESLORA_VENV:-$repo/.venv}
torch=${RESLORA_TORCH:-torch}
jobs=${RESLORA_JOBS:-2}
full=0
for argument in "$@"; do
  case $argument in
    --full) full=1 ;;
    *) echo "[run.sh] the only option is --full; got $argument" >&2; exit 2 ;;
  esac
done
# The C++ tests take more shapes with it.
if ((full)); then export RESLORA_FULL=1; else unset RESLORA_FULL; fi
# A user-wide or redirected installation would miss the virtual environment.
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 CMAKE_BUILD_PARALLEL_LEVEL=$jobs TOKENIZERS_PARALLELISM=false

# ccache: shared by all checkouts where it may be, inside this one where it may not.
export CCACHE_BASEDIR=$repo CCACHE_NOHASHDIR=1
ccache_folder=${CCACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/ccache}
if ! { mkdir -p "$ccache_folder" && [[ -w $ccache_folder ]]; } 2>/dev/null; then
  export CCACHE_DIR=$repo/build/ccache
fi

say() { printf '== %s\n' "$*"; }
die() { printf '[run.sh] %s\n' "$*" >&2; exit 2; }
have() { command -v "$1" >/dev/null 2>&1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if have "$candidate" && is_new_enough "$candidate"; then echo "$candidate"; return; fi
  done
}

# Debian packages that are absent. $1: the interpreter, or nothing where there is none.
missing_packages() {
  have g++ || echo g++
  have ccache || echo ccache
  have clang-format || echo clang-format
  have doxygen || echo doxygen
  have pkg-config || echo pkg-config
  [[ -e /usr/include/gtest/gtest.h ]] || echo libgtest-dev
  [[ -e /usr/include/gmock/gmock.h ]] || echo libgmock-dev
  if ((full)) && [[ ! -e /usr/include/benchmark/benchmark.h ]]; then echo libbenchmark-dev; fi
  if [[ -z $1 ]]; then
    echo python3 python3-dev python3-venv
    return
  fi
  "$1" -c 'import ensurepip' 2>/dev/null || echo "$(basename "$1")-venv"
  "$1" -c 'import os, sysconfig as s
raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' || echo "$(basename "$1")-dev"
}

install_packages() {
  local missing
  missing=$(missing_packages "$(find_python)" | xargs)
  [[ -n $missing ]] || return 0
  if [[ $(id -u) == 0 ]] && have apt-get; then
    say "installing $missing"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 ||
      { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
          apt-get install -y -qq --no-install-recommends $missing >/dev/null; } ||
      say "apt-get could not install all of: $missing"
  fi
  missing=$(missing_packages "$(find_python)" | tr ' ' '\n' | grep -vxE 'ccache|clang-format|doxygen|pkg-config' | xargs || true)
  [[ -z $missing ]] || die "These Debian packages are missing: $missing; install them" \
    "(sudo apt-get install $missing) and run this again."
}

make_venv() {
  local python
  if is_new_enough "$venv/bin/python" && "$venv/bin/python" -c "import pip"; then return; fi
  python=$(find_python)
  [[ -n $python ]] || die "Python 3.11 or newer is needed and none was found; name one with PYTHON=."
  say "making a virtual environment with $("$python" --version)"
  "$python" -m venv "$venv"
}

# Runs pip only when what pyproject.toml asks for, or RESLORA_TORCH, has changed.
install_requirements() {
  local stamp=$venv/reslora-requirements.txt wanted
  wanted=$(python - "$torch" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
build = [r for r in project["build-system"]["requires"] if not r.startswith("torch")]
print(*[sys.argv[1], "cmake>=3.25", "ninja", *build,
        *project["project"]["optional-dependencies"]["test"]], sep="\n")
PYTHON
  )
  if [[ -e $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  say "installing $torch and the test packages (the first time this takes minutes)"
  rm -f "$stamp"
  printf '%s\n' "$wanted" >"$venv/requirements.tmp"
  python -m pip install --quiet --upgrade --upgrade-strategy only-if-needed -r "$venv/requirements.tmp"
  mv "$venv/requirements.tmp" "$stamp"
}

# One build tree for the package and the C++ tests: nothing is compiled twice.
build() {
  say "building with $jobs jobs"
  python -m pip install --quiet --no-build-isolation \
    --config-settings=cmake.define.RESLORA_BUILD_TESTS=ON \
    --config-settings=cmake.define.RESLORA_WERROR=ON --editable .
}

build_folder() {
  python -c 'import sys, sysconfig
tag = "cp%d%d" % sys.version_info[:2]
print(f"build/{tag}-{tag}-" + sysconfig.get_platform().replace("-", "_").replace(".", "_"))'
}

seconds_of() { printf '%s: %d s\n' "$1" "$((SECONDS - $2))"; }

started=$SECONDS
install_packages
make_venv
export PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv
install_requirements
timings=$(seconds_of install "$started")

part=$SECONDS
build
timings+="; $(seconds_of build "$part")"
results=$repo/$(build_folder)/results
mkdir -p "$results"
rm -f "$results"/*.xml "$results"/gtest/*.xml "$results"/style.txt

part=$SECONDS
say "style"
style_options=()
if ((full)); then style_options+=(--headers); fi
python tests/style.py ${style_options[@]+"${style_options[@]}"} || touch "$results/style.txt"
timings+="; $(seconds_of style "$part")"

part=$SECONDS
say "ctest"
GTEST_OUTPUT=xml:$results/gtest/ OMP_NUM_THREADS=1 ctest --test-dir "$(build_folder)" \
  --parallel "$jobs" --no-tests=error --output-on-failure --output-junit "$results/ctest.xml" || true
timings+="; $(seconds_of ctest "$part")"

part=$SECONDS
say "pytest"
selection=(-m "not full")
if ((full)); then selection=(); fi
python -m pytest -q --junitxml="$results/pytest.xml" ${selection[@]+"${selection[@]}"} || true
timings+="; $(seconds_of pytest "$part")"

say "summary"
echo "${timings//$'\n'/}"
exec python tests/summary.py "$results"
