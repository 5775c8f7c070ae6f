"""Tells people what pip is doing, in few lines; all of pip's own go to a file.

    pip install torch 2>&1 | python progress.py install quickstart pip.log
    pip install -v .  2>&1 | python progress.py build quickstart build.log

Prints large downloads and how many packages are installed; of a build "compiling, 12 of 21", on one
line where a terminal looks, else every tenth.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial

LARGE = 50  # megabytes


def tell(program: str, sentence: str, end: str = "\n") -> None:
    """Print a line for people at once."""
    print(f"{program}: {sentence}", end=end, file=sys.stderr, flush=True)


def show_install(program: str, line: str) -> None:
    """Show what is worth showing of a line of `pip install`."""
    size = re.search(r"\(([\d.]+) (MB|GB)\)", line)
    if line.startswith("Downloading ") and size:
        if size[2] == "GB" or float(size[1]) >= LARGE:
            tell(program, f"d{line[1:]}")
    elif line.startswith("Installing collected packages: "):
        tell(program, f"installing {line.count(',') + 1} packages")


def show_build(program: str, line: str) -> None:
    """Show what is worth showing of a line of a build by Ninja."""
    if count := re.match(r"(?:.* )?\[(\d+)/(\d+)\] ", line):
        done, total = int(count[1]), int(count[2])
        if done == 0:  # Ninja is still looking
            return
        if sys.stderr.isatty():
            print("\r", end="", file=sys.stderr)
            tell(program, f"compiling, {done} of {total}", "\n" if done == total else "")
        elif done % 10 == 0 or done == total:
            tell(program, f"compiling, {done} of {total}")
    elif refusal := re.search(r"reslora: (without CUDA kernels.*)", line):
        tell(program, refusal[1])


def main(what: str, program: str, log: str) -> None:
    """Read pip's lines from the standard input until it ends."""
    show: Callable[[str], None] = partial(
        {"install": show_install, "build": show_build}[what], program
    )
    with open(log, "w", encoding="utf-8") as file:
        for line in sys.stdin:
            file.write(line)
            file.flush()
            show(line.strip())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)  # the script that reads us says it
