"""What is to be known on a GPU, the most valuable first, and how long each part may take.

Parts of one program share its process, since loading torch, PEFT and transformers takes longer than
most of them; one that fails, or runs out of time, ends the process, and the rest starts anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build/gpu"
PACKAGE = BUILD / "site"  # where build_package.py puts the package
GPU_TESTS = "tests/python/gpu"


@dataclass(frozen=True)
class Part:
    """A piece of the plan: seconds that are kept for it, and that it may take at most."""

    name: str
    least: float
    most: float
    from_minutes: float = 0  # smaller budgets run it in time left over, or not at all


@dataclass(frozen=True)
class Program:
    """A process: its command and its parts.

    One with `is_sectioned` gets the names of its parts as further arguments and says when each
    begins and ends (session.py); another has one part, its whole run.
    """

    command: list[str]
    parts: list[Part]
    is_sectioned: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    tool: str = ""  # a program that must be on PATH
    kept_as: str = ""  # a file for all it prints, in place of the log
    digest: Callable[[Sequence[str]], Any] | None = None  # from its lines to a result


def programs(options: argparse.Namespace) -> list[Program]:
    """Return everything in the order in which it is run."""
    sizes = ["--device", options.device, "--scale", str(options.scale)]
    build = [sys.executable, str(HERE / "build_package.py"), "--device", options.device]
    measure = [sys.executable, str(HERE / "measure.py"), *sizes]
    fused = {"RESLORA_KERNELS": "fused"}
    return [
        Program(build, [Part("build", 60, 330)]),
        Program(
            [sys.executable, "-m", "reslora", "doctor", "--json"],
            [Part("doctor", 15, 60)],
            variables={"RESLORA_KERNELS": "auto"},  # with the self-check
            digest=last_json,
        ),
        Program(
            measure,
            [Part("numerics", 15, 60), Part("kernels", 25, 60), Part("speed", 40, 110)],
            is_sectioned=True,
            variables=fused,
        ),
        Program(test_command(options), [Part("tests", 40, 150)], variables=fused, digest=tally),
        Program(
            measure,
            [
                Part("model", 45, 150, 15),
                Part("speed_more", 40, 120, 15),
                Part("compiled", 45, 150, 15),
                Part("graphs", 30, 80, 20),
            ],
            is_sectioned=True,
            variables=fused,
        ),
        *(tool_program(name, options) for name in ("ncu", "memcheck", "racecheck")),
    ]


def test_command(options: argparse.Namespace) -> list[str]:
    """Return the tests of a device; to try the script itself, a few of them on the CPU."""
    chosen = "not cpu" if options.device == "cuda" else "cpu and near_to_fp64"
    words = ["-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-m", "not full", "-k", chosen]
    return [sys.executable, "-m", "pytest", *words, GPU_TESTS]


def tool_program(name: str, options: argparse.Namespace) -> Program:
    """Return a program of CUDA's tools around a few steps of the op."""
    steps = [sys.executable, str(HERE / "once.py"), "--device", options.device]
    variables = {"RESLORA_KERNELS": "fused", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if name == "ncu":
        width = str(max(16, 4096 // options.scale))
        words = ["ncu", "--clock-control", "none", "--set", "full", "--page", "details"]
        words += ["-k", "regex:.*(project|expand).*", "-c", "8"]
        shape = [str(max(16, 8192 // options.scale)), width, width, "16"]
        part, variables = Part(name, 40, 100, 20), {"RESLORA_KERNELS": "fused"}
        return Program([*words, *steps, *shape], [part], False, variables, name, "ncu.txt")
    tool = "compute-sanitizer"
    checked = [tool, "--tool", name, "--error-exitcode", "9"]
    steps += ["130", "776", "520", "9", "70", "264", "520", "64"]
    # A release that knows no such filter refuses the command: then all kernels are checked.
    both = 'filter=$1; shift; "$1" "${@:2:4}" --kernel-regex "$filter" "${@:6}"; code=$?; '
    both += '((code == 0 || code == 9)) && exit $code; exec "$@"'
    command = ["bash", "-c", both, "bash", "kns=_ZN7reslora", *checked, *steps]
    part = Part(name, 40, 150, 20)
    return Program(command, [part], False, variables, tool, f"{name}.txt", error_summary)


def last_json(lines: Sequence[str]) -> Any:
    """Return the JSON that a command printed, whatever stands before it."""
    text = "\n".join(lines)
    try:
        return json.loads(text[text.index("\n{\n") if "\n{\n" in text else text.index("{\n") :])
    except ValueError:  # it was cut off, or it printed none
        return None


def tally(lines: Sequence[str]) -> dict[str, Any]:
    """Return how pytest's tests ended, those of a run cut off too, and the names that failed."""
    found = [re.search(r"(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", line) for line in lines]
    ended = {match[1]: match[2] for match in found if match}
    failed = [name for name, how in ended.items() if how in ("FAILED", "ERROR")]
    return {"counts": dict(Counter(ended.values())), "failed": failed}


def error_summary(lines: Sequence[str]) -> list[str]:
    """Return the lines in which compute-sanitizer sums up."""
    return [line for line in lines if "SUMMARY" in line or "Internal" in line]


def environment(program: Program) -> dict[str, str]:
    """Return the variables of a program: the package that was built stands before any other."""
    paths = [str(PACKAGE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **own, **program.variables}
