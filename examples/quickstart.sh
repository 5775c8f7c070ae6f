#!/usr/bin/env bash
# One command from a fresh Linux machine to a fine-tuned, merged and exported model:
#
#   bash examples/quickstart.sh                                      # no model or data to download
#   bash examples/quickstart.sh --model NAME_OR_FOLDER --data FILE   # your model, your text
#   bash examples/quickstart.sh --help
#
# It keeps a virtual environment in ${XDG_CACHE_HOME:-~/.cache}/reslora, installs reslora and what the
# example needs there (again only when something changed), and passes its arguments on. About 8 GB are
# needed there. tests/setup.sh lists the variables that change what is installed.
# For developers: RESLORA_PYTHON=<python with reslora installed> skips all of that.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # `sh` may name another shell
set -euo pipefail

program=quickstart
# shellcheck source=../tests/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tests/setup.sh"
script=$repository/examples/python/finetune.py
caches=${XDG_CACHE_HOME:-}
# As the XDG standard has it, a relative path counts as none; ~ is known where HOME is not set.
if [[ $caches != /* ]]; then caches=$(echo ~)/.cache; fi
cache=$caches/reslora
venv=$cache/venv
logs=$cache

# Prints what reslora is built from; a change builds it again.
fingerprint() {
  {
    cat "$venv/reslora-packages.txt"
    cd "$repository"
    find CMakeLists.txt pyproject.toml include src python -type f \
      -not -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d' ' -f1
}

# Ends with the answer to --help or to a request that cannot be served, as far as the standard library
# tells. $1: `options`, or `places` for those and where files go; then the request.
answer_at_once() {
  local python answer
  python=$(find_python)
  [[ -n $python ]] || return 0  # what is missing is told later
  answer=$("$python" -B "$script" --check "$@") || exit
  [[ -z $answer ]] || { printf '%s\n' "$answer"; exit; }
}

install_reslora() {
  local made_of=$venv/reslora-made-of.txt wanted
  wanted=$(fingerprint)
  if [[ -e $made_of && $(<"$made_of") == "$wanted" ]]; then return; fi
  rm -f "$made_of"
  build_reslora "$venv" --force-reinstall \
    --config-settings=build-dir="$cache/build" "$repository"
  echo "$wanted" >"$made_of"
}

if [[ -n ${RESLORA_PYTHON:-} ]]; then
  exec "$RESLORA_PYTHON" "$script" "$@"
fi
if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
  say "tested on Linux x86-64 only; $(uname -sm) is untested."
fi
answer_at_once options "$@"
check_folder "$cache" "$(space_for "$venv")" XDG_CACHE_HOME
answer_at_once places "$@"
lock_folder "$cache"
require_packages use
make_environment "$venv" example
install_reslora
unlock
exec "$venv/bin/python" "$script" "$@"
