# shellcheck shell=bash
# What the scripts of this project need from a machine: an interpreter, Debian packages, a virtual
# environment, a build of reslora. Sourced by examples/quickstart.sh, tests/run.sh, benchmarks/gpu.sh:
#
#   program=quickstart                     # stands before every message
#   logs=FOLDER                            # where pip.log and build.log are kept
#   source tests/setup.sh
#   check_folder FOLDER 8 VARIABLE         # it can be written and has 8 GB free
#   lock_folder FOLDER                     # nobody else is at work there
#   require_packages use                   # Debian packages: installed where that is allowed
#   make_environment VENV example [MORE]   # with what pyproject.toml lists as `example`; then, without
#                                          # isolation, what it lists as MORE
#   build_reslora VENV                     # compiles and installs; prints "12 of 21"
#
# What pip installs is bounded by constraints.txt beside this file, so that a script does next year
# what it does today.
#
# RESLORA_NEWEST=1  takes the newest of everything instead
# RESLORA_TORCH     what pip installs as torch, in place of the bounded one; for example torch==2.11.*
# RESLORA_JOBS      compile jobs (default: what cores and memory allow)
# PYTHON            interpreter for a new virtual environment (default: the first that is new enough)

unset CDPATH  # with it, cd prints where it goes
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
constraints=$repository/tests/constraints.txt
# Without these the tests run, and say what they miss.
optional_packages='ccache|clang-format|doxygen|pkg-config'
unfinished=""  # a folder that is removed when the script ends early

# A user-wide or redirected installation would miss the virtual environment.
unset PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

say() { printf '%s: %s\n' "$program" "$*" >&2; }
die() { say "$@"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

if [[ -n ${RESLORA_JOBS+set} && ! $RESLORA_JOBS =~ ^[1-9][0-9]*$ ]]; then
  die "RESLORA_JOBS must be a whole number of at least 1; got '$RESLORA_JOBS'"
fi

remove_unfinished() { [[ -z $unfinished ]] || rm -rf "$unfinished"; }
trap remove_unfinished EXIT
trap 'echo >&2; say "interrupted; run it again to go on"; exit 130' INT
trap 'exit 143' TERM

# ---- The machine

# Ends unless folder $1 can be written, made where it is absent, and has $2 GB free. $3: what names
# another folder.
check_folder() {
  local folder=$1 needed=$2 free
  { mkdir -p "$folder" && [[ -w $folder ]]; } 2>/dev/null ||
    die "$folder cannot be written; name another folder with $3"
  free=$(df --output=avail -k "$folder" 2>/dev/null | tail -n 1 | tr -cd 0-9) || true
  # Some file systems do not tell.
  free=$((${free:-$((needed * 1000000))} / 1000000))
  ((free >= needed)) ||
    die "$needed GB are needed in $folder, for torch and other packages; got $free GB free: free" \
      "some, or name another folder with $3"
}

# Prints how many GB environment $1 will take: none where it is complete.
space_for() { if [[ -e $1/reslora-packages.txt ]]; then echo 0; else echo 8; fi; }

# Waits until nobody else is at work in folder $1, and keeps others out until `unlock`. Where the file
# system has no locks, nobody is waited for.
lock_folder() {
  local code=0
  exec 9>"$1/lock"
  flock --nonblock --conflict-exit-code 75 9 2>/dev/null || code=$?
  ((code == 75)) || return 0
  say "waiting for another run that is at work in $1"
  flock 9
}
unlock() { exec 9>&-; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Prints the first interpreter that is new enough, or nothing.
find_python() {
  local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if is_new_enough "$candidate"; then command -v "$candidate"; return; fi
  done
}

# Prints the Debian packages that are absent. $1: what for, `use`, `test` or `full`.
missing_packages() {
  local python tool
  tool=${CXX:-c++}
  have "${tool%% *}" || echo g++  # CXX may hold options, or ccache before the compiler
  python=$(find_python)
  if [[ -z $python ]]; then
    printf '%s\n' python3 python3-venv python3-dev
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "${python##*/}-venv"
    "$python" -c 'import os, sysconfig as s
raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' || echo "${python##*/}-dev"
  fi
  [[ $1 != use ]] || return 0
  for tool in ccache clang-format doxygen pkg-config; do have "$tool" || echo "$tool"; done
  [[ -e /usr/include/gtest/gtest.h ]] || echo libgtest-dev
  [[ -e /usr/include/gmock/gmock.h ]] || echo libgmock-dev
  [[ $1 != full || -e /usr/include/benchmark/benchmark.h ]] || echo libbenchmark-dev
}

# Installs what is absent where that is allowed; otherwise says it in one sentence and ends.
require_packages() {
  local missing command=(apt-get install -y -qq --no-install-recommends) log
  [[ -z ${PYTHON:-} ]] || have "$PYTHON" || die "PYTHON must name an interpreter; got '$PYTHON'"
  missing=$(missing_packages "$1" | xargs)
  [[ -n $missing ]] || return 0
  if [[ $(id -u) == 0 ]] && have apt-get; then
    say "installing $missing"
    log=$(mktemp)
    # shellcheck disable=SC2086  # a list of words
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive "${command[@]}" $missing; } >"$log" 2>&1 ||
      tail -n 5 "$log" >&2
    rm -f "$log"
  fi
  missing=$(missing_packages "$1" | { grep -vxE "$optional_packages" || true; } | xargs)
  [[ -n $missing ]] || return 0
  if [[ -z $(find_python) ]] && have "${PYTHON:-python3}"; then
    die "Python 3.11 or newer is needed; got $(version_of "${PYTHON:-python3}") as" \
      "$(command -v "${PYTHON:-python3}"): install a newer one and name it with PYTHON=, or" \
      "'sudo apt-get install $missing' where Debian has it"
  fi
  die "these Debian packages are missing: $missing; install them with" \
    "'sudo apt-get install $missing' and run this again"
}

# Prints how many files to compile at once: each takes about 2 GiB of memory.
compile_jobs() {
  local cores gigabytes jobs
  cores=$(nproc)
  gigabytes=$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null) || true
  gigabytes=${gigabytes:-4}
  jobs=$((gigabytes / 2 < cores ? gigabytes / 2 : cores))
  echo "${RESLORA_JOBS:-$((jobs > 1 ? jobs : 1))}"
}

# ---- Python packages

# Prints what pyproject.toml lists for the extras named, one a line; for `build` also what the build
# system requires, torch among it, so that reslora is built against the torch that is installed.
requirements() {
  "$(find_python)" - "$repository/pyproject.toml" "${RESLORA_TORCH:-}" "$@" <<'PYTHON'
import sys, tomllib
path, torch, *extras = sys.argv[1:]
project = tomllib.load(open(path, "rb"))
wanted = project["build-system"]["requires"] if "build" in extras else []
for extra in extras:
    wanted = wanted + project["project"]["optional-dependencies"][extra]
print(*(torch if torch and r.startswith("torch>") else r for r in wanted), sep="\n")
PYTHON
}

# Prints the bounds in force: none of torch's where the caller names a torch.
bounds() {
  if [[ ${RESLORA_NEWEST:-0} == 1 ]]; then return; fi
  if [[ -n ${RESLORA_TORCH:-} ]]; then grep -v '^torch' "$constraints"; else cat "$constraints"; fi
}

# Shows people what pip does; $1: `install` or `build`, $2: the log that holds all of it.
show_progress() { "$(find_python)" "$repository/tests/progress.py" "$1" "$program" "$logs/$2"; }

# Installs requirements $2 in environment $1, within the bounds; the rest is for pip.
install_requirements() {
  local venv=$1
  bounds >"$venv/bounds.txt"
  printf '%s\n' "$2" >"$venv/requirements.txt"
  shift 2
  "$venv/bin/python" -m pip install --progress-bar off --upgrade --upgrade-strategy only-if-needed \
    -c "$venv/bounds.txt" -r "$venv/requirements.txt" "$@" 2>&1 | show_progress install pip.log && return
  if grep -qE 'connection broken by|NewConnectionError|NameResolutionError' "$logs/pip.log"; then
    die "pip could not reach its package index: a network is needed the first time; $logs/pip.log" \
      "has its words; run it again to go on"
  fi
  tail -n 8 "$logs/pip.log" >&2
  die "pip could not install the packages; its last words stand above, and $logs/pip.log has the" \
    "rest; run it again to go on"
}

# Makes virtual environment $1 with the packages of extra $2 and, without isolation, of extra $3;
# does nothing where they are there already. What a failed first try has made is removed.
make_environment() {
  local venv=$1 python wanted stamp=$1/reslora-packages.txt
  python=$(find_python)
  wanted=$("$python" --version; requirements build "${@:2}"; bounds)
  if [[ -e $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    return
  fi
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    unfinished=$venv
    say "making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || die "no virtual environment could be made in $venv"
  fi
  say "installing torch and other packages (once; some 3 GB are downloaded)"
  rm -f "$stamp"
  install_requirements "$venv" "$(requirements build "$2")"
  if [[ -n ${3:-} ]]; then
    install_requirements "$venv" "$(requirements "$3")" --no-build-isolation
  fi
  printf '%s\n' "$wanted" >"$stamp"
  unfinished=""
}

# ---- Building

# Builds reslora with environment $1 and installs it there; the rest is for pip.
build_reslora() {
  local venv=$1 log=$logs/build.log
  shift
  say "building reslora with $(compile_jobs) compile jobs (minutes, the first time)"
  CMAKE_BUILD_PARALLEL_LEVEL=$(compile_jobs) "$venv/bin/python" -m pip install -v \
    --no-build-isolation --no-deps "$@" 2>&1 | show_progress build build.log || {
    # The compiler's words, or CMake's; else the end.
    awk '/FAILED:|CMake Error|[^a-z]error:/ {found = 1} found && shown++ < 60' "$log" >&2
    grep -qE 'FAILED:|CMake Error|[^a-z]error:' "$log" || tail -n 20 "$log" >&2
    die "reslora could not be built; the words above say why, and $log has the rest"
  }
}
