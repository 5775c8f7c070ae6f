"""Runs what is missing of the study: LoRA, its variants and the shortcuts, each at its best rate.

python benchmarks/paper/study.py --task shakespeare --budget 30  # minutes; goes on where it was
python benchmarks/paper/study.py --task shakespeare --show       # what is done and what is left
python benchmarks/paper/study.py --task smoke --budget 1         # tries the program in seconds

grid.json says what is run. One run is one process with one thread and becomes one line in
results/paper/TASK.jsonl; no run starts that would end after the budget, and one that is killed
leaves no line. `--jobs` processes run side by side (on a GPU, several small models fill it).
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

import reslora

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from cells import cells_of, next_runs, runs_left, seconds_left, seconds_of  # noqa: E402
from lines import Line, Run, append, read, run_of  # noqa: E402
from tasks import Places, StudyTask, load  # noqa: E402
from training import one_run  # noqa: E402

SHARED = Path("../shared")
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
PR_SET_PDEATHSIG = 1
# Files of this folder that no run depends on: a page that was just written changes no line.
REPORTING = (
    "README.md",
    *(f"{n}.py" for n in "comparison page paired picture report tables".split()),
)


class Study:
    """The runs of one task: starts them, notes them, and says what is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.grid: dict[str, Any] = json.loads(options.grid.read_text())
        if options.task not in self.grid["tasks"]:
            known = ", ".join(self.grid["tasks"])
            raise ValueError(f"--task must be one of {known}; got {options.task}")
        self.task, self.device, self.jobs = options.task, options.device, options.jobs
        self.places = Places(options.model, options.data)
        self.path = options.results / f"{options.task}.jsonl"
        self.running: dict[BaseProcess, tuple[Run, float]] = {}
        self.failed: list[Run] = []

    def run(self, minutes: float) -> int:
        """Run what is missing until the minutes are over; return the exit code."""
        self.deadline = time.monotonic() + 60 * minutes
        with self._alone():
            self.loaded = load(self.task, self.grid["tasks"][self.task], self.places)
            self.origin = origin()
            try:
                while self._start_some() or self.running:
                    self._wait_for_one()
            finally:
                for process in self.running:
                    process.kill()
        print(self.summary(), flush=True)
        if self.failed:
            print(f"study.py: stopped, since a run failed: {self.failed[0]}", file=sys.stderr)
        return bool(self.failed)

    def _alone(self) -> Any:
        """Hold the lock that keeps a second program from doing the same runs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"one program at a time can run {self.task}; another one does"
            ) from None
        return lock

    def _start_some(self) -> bool:
        """Start runs while cores are free and the budget allows; say whether one was started."""
        lines = read(self.path)
        under_way = {run for run, _ in self.running.values()}
        started = False
        for run in next_runs(lines, self.grid, self.task):
            if self.failed or len(self.running) >= self.jobs:
                break
            if run in under_way:
                continue
            if time.monotonic() + seconds_of(run, lines, self.grid) <= self.deadline:
                self._start(run)
                started = True
        return started

    def _start(self, run: Run) -> None:
        arguments = (run, self.loaded, self.grid, self.device, self.origin, self.path)
        process = multiprocessing.get_context("fork").Process(target=_child, args=arguments)
        process.start()
        self.running[process] = (run, time.monotonic())

    def _wait_for_one(self) -> None:
        """Wait until a run ends, and say what came out."""
        wait([process.sentinel for process in self.running])
        for process in [p for p in self.running if not p.is_alive()]:
            run, started = self.running.pop(process)
            if process.exitcode != 0:
                self.failed.append(run)
                continue
            lines = read(self.path)
            line = next(one for one in reversed(lines) if run_of(one) == run)
            print(
                f"{time.strftime('%H:%M:%S')} {run}: {_result(line)}, "
                f"{time.monotonic() - started:.0f} s; {self._left(lines)}",
                flush=True,
            )

    def _left(self, lines: list[Line]) -> str:
        """Return how much is missing, in runs and hours."""
        cells = self._cells()
        runs = sum(runs_left(cell, lines, self.grid) for cell in cells)
        hours = sum(seconds_left(cell, lines, self.grid) for cell in cells) / 3600 / self.jobs
        return f"{len(lines)} runs done, about {runs} left, {hours:.1f} h with --jobs {self.jobs}"

    def _cells(self) -> list[Any]:
        questions = [q for q in self.grid["questions"] if self.task in q["tasks"]]
        return [cell for q in questions for cell in cells_of(q, self.grid, self.task)]

    def summary(self) -> str:
        """Return a table of the cells: runs done, best rate's losses, what is left."""
        lines = read(self.path)
        text = [f"{'method':<15}{'rank':>4}{'tuned':>7}{'tested':>8}{'left':>6}{'s a run':>9}"]
        counts = Counter((line["method"], line["rank"], line["phase"]) for line in lines)
        for cell in self._cells():
            key = (cell.method, cell.rank)
            text.append(
                f"{cell.method:<15}{cell.rank:>4}{counts[*key, 'tune']:>7}{counts[*key, 'test']:>8}"
                f"{runs_left(cell, lines, self.grid):>6}{seconds_of(cell, lines, self.grid):>9.0f}"
            )
        return "\n".join([*text, f"{self.task}: {self._left(lines)}"])


def _result(line: Line) -> str:
    if line["diverged"]:
        return "diverged"
    part = "test" if line["test"] else "validation"
    return f"{part} loss {line[part]['loss']:.4f}"


def _child(
    run: Run,
    task: StudyTask,
    grid: dict[str, Any],
    device: str,
    origin: dict[str, Any],
    path: Path,
) -> None:
    """Do one run in a process of its own, which ends when its parent does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    try:
        append(path, one_run(run, task, grid, device, origin))
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def origin() -> dict[str, Any]:
    """Return versions and commits; those of the sources of reslora and of the study, each apart."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    package = Path(reslora.__file__).parent
    own = [":/benchmarks/paper", ":/benchmarks/merge_tasks.py"]
    own += [f":(top,exclude)benchmarks/paper/{name}" for name in REPORTING]
    return {
        "versions": versions | {"reslora": reslora.__version__},
        "commit": _commit(package, ":/include", ":/python", ":/src"),
        "study_commit": _commit(HERE, *own),
    }


def _commit(folder: Path, *paths: str) -> str | None:
    """Return the last commit that changed some paths, marked where they have changed since."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(folder), *words, "--", *paths]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        found = git("log", "-1", "--format=%H").stdout[:12]
        changed = found and git("diff", "--quiet", "HEAD").returncode
    except OSError:
        return None
    return f"{found}-dirty" if changed else found or None


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, help="a task of the grid")
    parser.add_argument("--budget", type=float, help="minutes; no run starts that would end later")
    parser.add_argument("--show", action="store_true", help="print what is done and what is left")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--grid", type=Path, default=HERE / "grid.json")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results/paper")
    parser.add_argument("--model", type=Path, default=SHARED / "models/tiny-llama")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    options = parser.parse_args(arguments)
    if options.budget is None and not options.show:
        parser.error("--budget or --show must be given")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {options.jobs}")
    return options


def main(arguments: list[str]) -> int:
    """Run or show one task; return the exit code."""
    options = parse(arguments)
    os.environ.update(ENVIRONMENT)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # transformers, of its own
    logging.set_verbosity_error()  # it reports that heads are new, and draws bars
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # of a process that forks, and of its children
    try:
        study = Study(options)
        if not options.show:
            return study.run(options.budget)
        print(study.summary())
    except (OSError, ValueError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study.py: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
