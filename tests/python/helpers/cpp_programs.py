"""Builds C++ programs against the installed reslora, as a user would; shared by the tests of them.

Build folders are kept under build/cpp-*, so that a second run compiles nothing.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from reslora.commands.options import cmake_prefix_path

REPOSITORY = Path(__file__).resolve().parents[3]
TORCH = Path(torch.__file__).parent
BUILDS = REPOSITORY / "build"  # as deep as the package's own: ccache knows the files then


def environment() -> dict[str, str]:
    """Return what programs run with: compile jobs, one thread, and Ninja for CMake.

    Small programs gain nothing from threads, spin for long where others use the cores too, and give
    the same bits for the same number of threads only. CMake's default generator needs `make`, which
    no package of ours brings along; pip brings Ninja.
    """
    defaults = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "OMP_NUM_THREADS": "1"}
    return {**defaults, **os.environ, "CMAKE_GENERATOR": "Ninja"}


def build_folder() -> Path:
    """Return the build tree of the installation that tests/run.sh makes."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return BUILDS / f"{tag}-{tag}-{platform}"


def run(*command: str | Path, cwd: Path = REPOSITORY) -> str:
    """Run a program; return what it printed, fail with it where it failed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def fails(*command: str | Path, cwd: Path) -> str:
    """Run a program that must fail; return what it printed on one line."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    return " ".join((done.stdout + done.stderr).split())


def build(source: Path, name: str, *options: str) -> Path:
    """Configure and build a project; return its build folder."""
    folder = BUILDS / f"cpp-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # another worker of pytest may want the same program
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", source, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *options)
        run("cmake", "--build", folder)
    return folder


def build_example(name: str) -> Path:
    """Build examples/cpp/<name> against the installed package; return the program."""
    prefix = f"-DCMAKE_PREFIX_PATH={cmake_prefix_path}"
    return build(REPOSITORY / "examples/cpp" / name, name, prefix) / name
