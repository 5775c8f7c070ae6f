"""benchmarks/gpu/run.py: its budget, and what is on disk at any moment; programs are stand-ins."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machine import REPOSITORY, wait_for

BENCHMARKS = REPOSITORY / "benchmarks"
MODULES = ("build_package", "plan", "run")  # names that nothing else may find
WAIT = "import time; time.sleep(600)"
BEGIN = 'import sys, time\nf = lambda w: print(w, flush=True)\n'  # fmt: skip
SECTION = "f('@begin {0}'); sys.stdin.readline()\n"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import run.py and plan.py, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    yield importlib.import_module("run"), importlib.import_module("plan")
    for name in MODULES:
        sys.modules.pop(name, None)


def outcome(
    modules: tuple[ModuleType, ModuleType], folder: Path, programs: list[Any], minutes: float = 1
) -> dict[str, Any]:
    """Run programs as a plan; return gpu.json."""
    run, plan = modules
    plan.programs = lambda options: programs
    options = argparse.Namespace(
        minutes=minutes, base=str(folder.parent), output=folder.name, device="cpu", scale=1,
        started=time.time(),
    )  # fmt: skip
    run.Run(options).everything()
    return json.loads((folder / "gpu.json").read_text())


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in report["steps"]}


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", BEGIN + "\n".join(lines)]


def test_a_part_that_fails_is_recorded_with_its_words_and_the_next_goes_on(modules, tmp_path):
    plan = modules[1]
    programs = [
        plan.Program(python("f('a word')", "sys.exit(3)"), [plan.Part("first", 1, 30)]),
        plan.Program(python("f('fine')"), [plan.Part("second", 1, 30)]),
    ]
    steps = by_name(outcome(modules, tmp_path, programs))
    assert steps["first"]["status"] == "failed"
    assert steps["first"]["reason"] == "it ended with 3: a word"
    assert steps["first"]["last_lines"] == ["a word"]
    assert steps["second"]["status"] == "done"
    assert "a word" in (tmp_path / "log.txt").read_text()


def test_half_a_result_and_numbers_that_json_has_not_do_no_harm(modules, tmp_path):
    plan = modules[1]
    body = python("f('@record a {\"x\": [NaN, Infinity, 1.5]}')", "f('@record a {\"x\": [1')")
    outcome(modules, tmp_path, [plan.Program(body, [plan.Part("a", 1, 30)])])

    def refuse(text: str) -> None:
        raise AssertionError(f"JSON has no {text}")

    report = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=refuse)
    assert report["results"] == {"a": [{"x": ["nan", "inf", 1.5]}]}
    assert by_name(report)["a"]["status"] == "done"


def test_no_module_takes_the_name_of_a_package():
    """Transformers looks for a package `kernels`, and would find a module of that name."""
    names = {path.stem for path in (BENCHMARKS / "gpu").glob("*.py")}
    packages = set(importlib.metadata.packages_distributions()) | {"kernels"}
    assert names & (packages | sys.stdlib_module_names) == set()


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(modules, tmp_path):
    plan = modules[1]
    child = f"import subprocess\np = subprocess.Popen([sys.executable, '-c', {WAIT!r}])"
    programs = [
        plan.Program(python(child, "f(p.pid)", WAIT), [plan.Part("long", 1, 3)]),
        plan.Program(python("pass"), [plan.Part("next", 1, 30)]),
    ]
    steps = by_name(outcome(modules, tmp_path, programs))
    assert steps["long"]["status"] == "out of time"
    assert steps["long"]["reason"] == "it may take 3 s"
    assert steps["next"]["status"] == "done"
    pid = int(steps["long"]["last_lines"][0])
    wait_for(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sections_share_a_process_until_one_fails(modules, tmp_path):
    plan = modules[1]
    body = """
import os
for name in sys.argv[1:]:
    f('@begin ' + name)
    limit = float(sys.stdin.readline())
    f('@record ' + name + ' {"pid": %d, "limit": %f}' % (os.getpid(), limit))
    if name == 'b':
        raise ValueError('b is bad')
    if name == 'c':
        time.sleep(600)
    f('@end ' + name)
"""
    parts = [plan.Part(name, 1, 4 if name == "c" else 20) for name in "abcd"]
    program = plan.Program(python(body), parts, is_sectioned=True)
    report = outcome(modules, tmp_path, [program])
    found = {name: step["status"] for name, step in by_name(report).items()}
    assert found == {"a": "done", "b": "failed", "c": "out of time", "d": "done"}
    assert by_name(report)["b"]["reason"] == "it ended with 1: ValueError: b is bad"
    pids = {name: report["results"][name][0]["pid"] for name in "abcd"}
    assert pids["a"] == pids["b"]
    assert len(set(pids.values())) == 3
    assert report["results"]["a"][0]["limit"] == 20  # what the others may need is not a's
    assert report["results"]["c"][0]["limit"] == 4


def test_the_budget_holds_and_the_first_come_first(modules, tmp_path):
    """Three parts that never end, kept 3 seconds each, in a budget of 9 less its reserve."""
    plan = modules[1]
    names = ["a", "b", "c"]
    programs = [plan.Program(python(WAIT), [plan.Part(name, 3, 60)]) for name in names]
    start = time.monotonic()
    steps = by_name(outcome(modules, tmp_path, programs, minutes=9 / 60))
    assert time.monotonic() - start < 9
    assert steps["a"]["reason"] == "it may take 3 s"
    assert steps["b"]["reason"] in ("it may take 2 s", "it may take 1 s")
    assert steps["c"]["reason"] == "no time is left"


def test_what_a_budget_or_the_machine_has_no_room_for_is_left_out(modules, tmp_path):
    plan = modules[1]
    programs = [
        plan.Program(python("pass"), [plan.Part("late", 1, 9, 15)]),
        plan.Program(["no-such-tool"], [plan.Part("tool", 1, 9)], tool="no-such-tool"),
        plan.Program(python(WAIT), [plan.Part("long", 1, 60)]),
        plan.Program(python("pass"), [plan.Part("last", 0, 9)]),
    ]
    steps = by_name(outcome(modules, tmp_path, programs, minutes=6 / 60))
    reasons = {name: step["reason"] for name, step in steps.items() if step["status"] == "left out"}
    assert reasons == {
        "late": "it is for budgets from 15 minutes on",
        "tool": "no-such-tool is not on PATH",
        "last": "no time is left",
    }


def test_time_left_over_is_used_within_the_budget(modules, tmp_path, monkeypatch):
    run, plan = modules
    monkeypatch.setattr(run, "STARTING", 1.0)
    programs = [
        plan.Program(python("pass"), [plan.Part("first", 1, 9)]),
        plan.Program(python("pass"), [plan.Part("fits", 2, 9, 15)]),
        plan.Program(python("pass"), [plan.Part("does not", 9, 9, 20)]),
        plan.Program(python(WAIT), [plan.Part("last", 1, 60, 20)]),
    ]
    start = time.monotonic()
    steps = by_name(outcome(modules, tmp_path, programs, minutes=12 / 60))
    assert time.monotonic() - start < 12
    assert {name: step["status"] for name, step in steps.items()} == {
        "first": "done", "fits": "done", "does not": "left out", "last": "out of time"
    }  # fmt: skip


# ---- The build


# Builds nothing, and keeps its first command.
BUILDING = """#!/bin/sh
[ "$1" = --build ] || { echo "$*" >"$LOG"; exit $CODE; }
mkdir -p "$2/python" "$2/src"
touch "$2/python/_C.so" "$2/src/libreslora.so"
echo "WITH_CUDA = \\"$KERNELS\\" == \\"ON\\"" >"$2/python/build_info.py"
"""


class Build:
    """build_package.py for a GPU, with stand-ins for the programs that it calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
        self.folder, self.patch, self.module = folder, monkeypatch, module
        self.package = folder / "build/site"
        monkeypatch.setattr(module, "BUILD", folder / "build")
        monkeypatch.setattr(module, "PACKAGE", self.package)
        monkeypatch.setattr(sys, "argv", ["build_package.py", "--device", "cuda"])
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setenv("LOG", str(folder / "log"))

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def run(self, kernels: str = "ON", code: int = 0, capability: str = "echo 9.0") -> str:
        """Build; return CMake's first command."""
        self.program("cmake", BUILDING)
        self.program("nvidia-smi", f"#!/bin/sh\n{capability}\n")
        self.patch.setenv("KERNELS", kernels)
        self.patch.setenv("CODE", str(code))
        self.module.main()
        return (self.folder / "log").read_text()


@pytest.fixture
def build(tmp_path, monkeypatch, modules):
    return Build(tmp_path, monkeypatch, importlib.import_module("build_package"))


def test_the_build_is_for_the_gpu_at_hand(build):
    command = build.run(capability="echo 9.0; echo 8.0; echo 9.0")
    assert "-DRESLORA_CUDA_ARCHITECTURES=80;90\n" in command
    found = {path.name for path in (build.package / "reslora").iterdir()}
    assert found >= {"__init__.py", "_C.so", "libreslora.so", "_build_info.py", "nn"}


def test_a_gpu_that_does_not_tell_is_built_for_all_the_same(build):
    assert "ARCHITECTURES" not in build.run(capability="echo '[N/A]'; exit 1")


def test_make_serves_where_there_is_no_ninja(build, monkeypatch):
    real = build.module.program
    monkeypatch.setattr(build.module, "program", lambda n: None if n == "ninja" else real(n))
    assert "-G Unix Makefiles" in build.run()


def test_a_build_without_kernels_is_said_and_can_be_measured(build, capsys):
    with pytest.raises(SystemExit) as ended:
        build.run(kernels="OFF")
    assert ended.value.code == 3
    assert capsys.readouterr().out.startswith("built without CUDA kernels;")
    assert (build.package / "reslora/_C.so").exists()


def test_a_build_that_fails_leaves_nothing_older_to_be_measured(build):
    build.run()
    with pytest.raises(subprocess.CalledProcessError):
        build.run(code=1)
    assert not build.package.exists()


# ---- Texts


def test_a_text_stays_below_its_limit(modules, tmp_path, monkeypatch):
    run, plan = modules
    monkeypatch.setattr(run, "MAX_BYTES", 1000)
    many = python("for n in range(5000): f('line %d' % n)")
    outcome(modules, tmp_path, [plan.Program(many, [plan.Part("a", 1, 50)], kept_as="a.txt")])
    text = (tmp_path / "a.txt").read_text()
    assert len(text) < 1100
    assert text.splitlines()[0] == "line 0"
    assert text.endswith("the rest is left out\n")


def test_pytest_and_tools_are_summed_up_even_where_they_were_cut_off(modules):
    plan = modules[1]
    lines = ["tests/a.py::one[cuda] PASSED [ 3%]", "tests/a.py::two FAILED [ 6%]", "tests/a.py::"]
    assert plan.tally(lines) == {
        "counts": {"PASSED": 1, "FAILED": 1},
        "failed": ["tests/a.py::two"],
    }
    assert plan.last_json(["a warning", "{", '  "kernels": {', "  }", "}"]) == {"kernels": {}}
    assert plan.last_json(["{", '  "kernels": {']) is None
    assert plan.error_summary(["=== ERROR SUMMARY: 0 errors", "x"]) == [
        "=== ERROR SUMMARY: 0 errors"
    ]


# ---- All of it, on the CPU

# Builds what this checkout has built.
CMAKE = """#!/bin/sh
case "$1" in
  --version) echo "cmake version 3.31.0" ;;
  --build) mkdir -p "$2/python" "$2/src"
    cp {built}/_C*.so "$2/python" && cp {built}/libreslora.so "$2/src"
    cp {info} "$2/python/build_info.py" ;;
  *) echo "$*" >{log} ;;
esac
"""
TOOL = """#!/usr/bin/env bash
while [[ $1 != */python* ]]; do shift; done
echo "ERROR SUMMARY: 0 errors"
exec "$@"
"""
PARTS = (
    "build doctor numerics kernels speed tests model speed_more compiled graphs ncu memcheck "
    "racecheck"
).split()


class Trial:
    """gpu.sh on the CPU, with stand-ins for CMake and CUDA's tools, into a folder."""

    def __init__(self, folder: Path) -> None:
        from reslora import _C, _build_info  # in an editable install not beside the sources

        tools = folder / "bin"
        self.output, self.cmake_log = folder / "out", folder / "cmake.log"
        built, info = Path(_C.__file__).parent, _build_info.__file__
        texts = {"cmake": CMAKE.format(built=built, info=info, log=self.cmake_log)}
        for name in ("cmake", "ncu", "compute-sanitizer"):
            tools.mkdir(exist_ok=True)
            (tools / name).write_text(texts.get(name, TOOL))
            (tools / name).chmod(0o755)
        self.environment = {
            **os.environ, "PYTHON": sys.executable, "PATH": f"{tools}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, minutes: int) -> subprocess.Popen[str]:
        """Start it in a process group of its own."""
        sizes = ["--device", "cpu", "--scale", "64"]
        options = [*sizes, "--minutes", str(minutes), "--output", self.output]
        return subprocess.Popen(
            ["bash", BENCHMARKS / "gpu.sh", *options],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "gpu.json").read_text())


@pytest.mark.timeout(700)
def test_every_part_runs_on_the_cpu_within_the_budget(tmp_path):
    """A minute on a machine with nothing else to do."""
    trial = Trial(tmp_path)
    start = time.monotonic()
    printed = trial.start(minutes=10).communicate()[0]
    assert time.monotonic() - start < 600, printed
    report = trial.report()
    steps = by_name(report)
    assert list(steps) == PARTS, printed
    assert {name: s["status"] for name, s in steps.items() if s["status"] != "done"} == {}, printed
    assert "-DRESLORA_CUDA=OFF" in trial.cmake_log.read_text()
    check_results(report["results"])
    files = list(trial.output.iterdir())
    assert len(files) <= 8
    assert max(path.stat().st_size for path in files) < 16 << 20


def check_results(results: dict[str, Any]) -> None:
    """Demand what each part is there for."""
    assert results["doctor"]["kernels"]["cpu"].startswith("reslora's own")
    assert all(row["faults"] == [] for row in results["numerics"])
    assert [len(row["steps"]) for row in results["kernels"]] == [3] * 4
    assert all(row["references"]["copy of x"]["GB/s"] > 0 for row in results["kernels"])
    variants = {"frozen", "peft", "reslora none", "reslora is", "reslora bs 3", "reslora ms"}
    tables = [*results["speed"], *results["speed_more"], *results["graphs"]]
    assert [row["failed"] for row in tables] == [{}] * 11
    assert all(row["results"].keys() >= variants for row in tables)
    assert sum("unsloth's calls" in row["results"] for row in tables) == 2
    assert {row["adapters"] for row in tables} == {"torch.bfloat16", "torch.float32"}
    assert results["model"][-1]["results"].keys() == {"frozen", "peft", "none", "is", "bs", "ms"}
    assert [row["graphs"] for row in results["compiled"]] == [1] * 4  # each was compiled
    assert results["tests"]["failed"] == []
    assert results["tests"]["counts"]["PASSED"] > 0
    assert results["racecheck"] == ["ERROR SUMMARY: 0 errors"]


def test_a_kill_at_any_second_leaves_valid_json(tmp_path):
    trial = Trial(tmp_path)
    started = trial.start(minutes=2)
    second = 3 + int.from_bytes(os.urandom(2)) / 65536 * 25
    with pytest.raises(subprocess.TimeoutExpired):
        started.communicate(timeout=second)
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    for path in trial.output.glob("*.json"):
        assert json.loads(path.read_text())["steps"] is not None, f"killed after {second} s"
