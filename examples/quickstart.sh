#!/usr/bin/env bash
# One command from a fresh Linux machine to a fine-tuned, merged and exported model:
#
#   bash examples/quickstart.sh                                      # no model or data to download
#   bash examples/quickstart.sh --model NAME_OR_FOLDER --data FILE   # your model, your text
#   bash examples/quickstart.sh --help
#
# It keeps a virtual environment in ${XDG_CACHE_HOME:-~/.cache}/reslora, installs reslora and what the
# example needs there (again only when something changed), and passes its arguments on.
# For developers: RESLORA_PYTHON=<python with reslora installed> skips all of that.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program="$repository/examples/python/finetune.py"
cache="${XDG_CACHE_HOME:-$HOME/.cache}/reslora"
venv="$cache/venv"
# Build tools come first, so that reslora is built against the torch that is installed.
packages=("torch>=2.11" "scikit-build-core>=0.10" cmake ninja)
example_packages=("transformers>=4.56" "tokenizers" "peft>=0.18" safetensors matplotlib tqdm numpy)

say() { printf 'quickstart: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# Prints the first interpreter that is new enough.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

# Prints the Debian packages that are missing, one a line.
missing_packages() {
  local python="$1"
  command -v c++ >/dev/null || echo g++
  if [[ -z "$python" ]]; then
    printf '%s\n' python3 python3-venv python3-dev
    return
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "${python##*/}-venv"
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    echo "${python##*/}-dev"
}

# Installs what is missing where that is allowed; otherwise says it in one sentence.
require_system_packages() {
  local missing
  missing="$(missing_packages "$(find_python)" | paste -sd' ')"
  [[ -z "$missing" ]] && return
  if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    say "installing $missing"
    # shellcheck disable=SC2086  # a list of words
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing; } \
      >"$cache/apt.log" 2>&1 || die "apt-get could not install $missing; see $cache/apt.log"
    missing="$(missing_packages "$(find_python)" | paste -sd' ')"
    [[ -z "$missing" ]] && return
  fi
  die "these Debian packages are missing (Python must be 3.11 or newer): $missing; install them" \
    "with 'sudo apt-get install $missing' and run this again"
}

# Prints what the environment is made from; a change installs again.
fingerprint() {
  {
    echo "${packages[@]}" "${example_packages[@]}"
    "$1" -c 'import sys; print(sys.version, sys.executable)'
    cd "$repository"
    find CMakeLists.txt pyproject.toml include src python -type f \
      -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d' ' -f1
}

# Prints how many files to compile at once: each takes about 2 GiB of memory.
compile_jobs() {
  local cores gigabytes jobs
  cores="$(nproc)"
  gigabytes="$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)"
  jobs=$((gigabytes / 2 < cores ? gigabytes / 2 : cores))
  echo $((jobs > 1 ? jobs : 1))
}

install() {
  local python="$1" made_of="$2" pip=("$venv/bin/python" -m pip install --quiet)
  pip+=(--disable-pip-version-check)
  say "setting up $venv (once; torch is a large download)"
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear "$venv" || die "could not make a virtual environment in $venv"
  fi
  rm -f "$venv/made_of"
  "${pip[@]}" "${packages[@]}" "${example_packages[@]}" || die "pip could not install torch and others"
  say "building reslora (a few minutes)"
  CMAKE_BUILD_PARALLEL_LEVEL="$(compile_jobs)" \
    "${pip[@]}" --no-build-isolation --force-reinstall --no-deps \
    --config-settings=build-dir="$cache/build" "$repository" ||
    die "reslora could not be built; the messages above say why"
  echo "$made_of" >"$venv/made_of"
}

if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
  say "tested on Linux x86-64 only; $(uname -sm) is untested."
fi
if [[ -n "${RESLORA_PYTHON:-}" ]]; then
  exec "$RESLORA_PYTHON" "$program" "$@"
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # two first runs at once would install into one folder
require_system_packages
python="$(find_python)"
made_of="$(fingerprint "$python")"
if [[ "$(cat "$venv/made_of" 2>/dev/null)" != "$made_of" ]] ||
  ! "$venv/bin/python" -c '' 2>/dev/null; then
  install "$python" "$made_of"
fi
exec 9>&-
exec "$venv/bin/python" "$program" "$@"
