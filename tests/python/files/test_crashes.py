"""A save is one event: a writer that dies, stops or fails at any change of the disk.

The folder reads as the old or the new adapter, whole, also beside a writer that has not ended; the
next save goes through and leaves nothing behind. tests/python/helpers/crash_program.py saves.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
CASES = [
    "first", "alpha", "statistics over none", "none over statistics", "statistics", "rank",
    "C++ first", "C++", "plug-in first", "plug-in", "plug-in over statistics",
    "export first", "export", "export rank", "merge",
]  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no compiler for Linux")
    library = tmp_path_factory.mktemp("shim") / "die_at.so"
    source = HELPERS / "die_at.cpp"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
    return library


def printed(shim: Path, folder: Path, case: str, step: int) -> str:
    """Return what the program says of a case."""
    done = subprocess.run(
        [sys.executable, HELPERS / "crash_program.py", case, folder, str(step)],
        env={**os.environ, "LD_PRELOAD": os.fspath(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check_case(shim: Path, folder: Path, case: str, step: int) -> None:
    if case.startswith("plug-in"):
        pytest.importorskip("peft", reason="peft is not installed")
    found = printed(shim, folder, case, step)
    points = dict(re.findall(r"^points (\w+) (\d+)$", found, re.MULTILINE))
    assert [line for line in found.splitlines() if not line.startswith("points ")] == []
    assert set(points) == {"dies", "stops", "fails"}
    assert all(10 < int(number) < 200 for number in points.values()), points


@pytest.mark.parametrize("case", CASES)
def test_a_save_is_one_event(shim, tmp_path, case):
    check_case(shim, tmp_path, case, 7)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_save_is_one_event_at_every_point(shim, tmp_path, case):
    check_case(shim, tmp_path, case, 1)


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.full)])
def test_a_recovery_that_dies_too_can_be_done_again(shim, tmp_path, step):
    found = printed(shim, tmp_path, "recovery", step)
    assert re.fullmatch(r"points dies \d\d\n", found), found


def test_of_two_writers_one_wins_whole(shim, tmp_path):
    assert printed(shim, tmp_path, "writers", 20) == ""
