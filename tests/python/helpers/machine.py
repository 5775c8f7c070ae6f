"""A machine made of stand-ins, to try the scripts of this repository on what the real one is not.

`Machine` is a folder of links to this machine's basic tools, with an interpreter that answers
questions truly and only pretends to make environments and to install. PATH holds nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
QUICKSTART = REPOSITORY / "examples/quickstart.sh"
TOOLS = (
    "awk", "bash", "cat", "chmod", "cp", "cut", "df", "dirname", "echo", "env", "find", "flock",
    "grep", "id", "mkdir", "mktemp", "nproc", "rm", "sed", "sh", "sha256sum", "sleep", "sort",
    "tail", "touch", "tr", "uname", "xargs", "c++", "g++", "gcc", "as", "ld",
)  # fmt: skip
CHECKOUT = (
    "CMakeLists.txt", "pyproject.toml", "benchmarks/gpu.sh", "examples/quickstart.sh",
    "examples/python/console.py", "examples/python/finetune.py", "examples/python/interrupts.py",
    "examples/python/options.py", "examples/python/places.py", "include/reslora/merge.h",
    "python/reslora/__init__.py", "src/core/chain.cpp", "tests/constraints.txt",
    "tests/lacking.py", "tests/progress.py", "tests/run.sh", "tests/setup.sh",
)  # fmt: skip
# Asked to install or to build, it does what the variable STUB_PIP holds. -S hides the packages of
# the real machine from the script that looks at a request before the installation.
PYTHON = f"""#!/bin/bash
echo "$*" >>"$STUB_LOG"
case "$1 $2" in
  "-B "*) exec {sys.executable} -S "$@" ;;
  "-c "* | "- "* | */progress.py\\ *) exec {sys.executable} "$@" ;;
  "--version "*) echo "Python 3.11.2" ;;
  "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && eval "${{STUB_VENV:-:}}" ;;
  "-m pip")
    if [[ $* == *--no-deps* ]]; then eval "${{STUB_BUILD:-:}}"; else eval "${{STUB_PIP:-:}}"; fi ;;
  *) echo "ran $*" ;;
esac
"""


class Machine:
    """A PATH, a home and a log of what the interpreter was asked to do."""

    def __init__(self, folder: Path) -> None:
        """Make the machine in an empty folder."""
        self.folder = folder
        self.bin, self.home, self.log = folder / "bin", folder / "home", folder / "log"
        for place in (self.bin, self.home):
            place.mkdir(parents=True)
        self.log.touch()
        for name in TOOLS:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)
        self.program("python3", PYTHON)
        self.cache = self.home / ".cache/reslora"

    def program(self, name: str, text: str) -> None:
        """Put a script on PATH, in place of what is there under its name."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(
        self, script: Path = QUICKSTART, shell: str = "bash", *arguments: str, **variables: str
    ) -> subprocess.Popen[str]:
        """Start a script in the machine's folder, in a process group of its own for Ctrl-C."""
        own = {"PATH": str(self.bin), "HOME": str(self.home), "STUB_LOG": str(self.log)}
        return subprocess.Popen(
            [*shell.split(), script, *arguments],
            cwd=self.folder,
            env={**own, "PYTHON": "python3", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell that runs the tests in the background lets its children ignore interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(
        self, script: Path = QUICKSTART, shell: str = "bash", *arguments: str, **variables: str
    ) -> tuple[int, str, str]:
        """Run a script to its end; return exit code, stdout and stderr."""
        started = self.start(script, shell, *arguments, **variables)
        printed, errors = started.communicate(timeout=120)
        return started.returncode, printed, errors

    def interrupt(self, started: subprocess.Popen[str], when: Path) -> tuple[int, str]:
        """Press Ctrl-C once a file is there; return exit code and stderr."""
        wait_for(when.exists)
        os.killpg(started.pid, signal.SIGINT)
        _, errors = started.communicate(timeout=60)
        return started.returncode, errors

    def asked(self, words: str) -> int:
        """Return how often the interpreter was asked for something."""
        return sum(words in line for line in self.log.read_text().splitlines())


def copy_of_checkout(folder: Path) -> Path:
    """Copy the scripts of the repository, what they read and a few sources; return the folder."""
    for name in CHECKOUT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def wait_for(condition: object, seconds: float = 30) -> None:
    """Return once the condition holds; fail after half a minute."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
