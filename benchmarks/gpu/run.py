"""What do our kernels do on this GPU: are they right, how fast are they, and what does a step cost?

Runs plan.py within a budget of minutes; `benchmarks/gpu.sh` starts it. Everything goes to one
folder, of at most 8 files: gpu.json, which is written whole after every case, so that a kill at any
moment loses the case in hand and nothing else; log.txt, what the programs printed; and a text for
each of CUDA's tools. A part that fails or runs out of time is recorded with its last words.

    python benchmarks/gpu/run.py --minutes 9 --output FOLDER
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import plan

sys.path.insert(0, str(plan.HERE.parent))
from whole_files import replace_text

RESERVE = 4.0  # seconds of the budget for what stands between the parts, and the last file
STARTING = 20.0  # that a program may take to load, where a part is run in time left over
MAX_BYTES = 8 << 20  # of a text
WORDS, WIDTH = 40, 300  # last lines of a part that are kept, and characters of each
QUESTION = (__doc__ or "").splitlines()[0]


class Text:
    """A text file that grows up to MAX_BYTES."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", errors="replace")
        self.room = MAX_BYTES

    def add(self, line: str) -> None:
        """Append a line at once."""
        if self.room > 0:
            self.room -= len(line.encode(errors="replace")) + 1
            self.file.write(f"{line}\n" if self.room > 0 else "the rest is left out\n")
            self.file.flush()


class Child:
    """A process in a group of its own, whose lines come with a time limit."""

    def __init__(self, command: list[str], variables: dict[str, str]) -> None:
        library = ctypes.CDLL(None)
        self.process = subprocess.Popen(
            command,
            cwd=plan.REPOSITORY,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: library.prctl(1, signal.SIGKILL),  # Linux: ends when we end
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def next_line(self, deadline: float) -> str | None:
        """Return a line, or None at the end; raises queue.Empty at the deadline."""
        return self.lines.get(timeout=max(0.0, deadline - time.monotonic()))

    def tell(self, text: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{text}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its last lines say why

    def kill(self) -> None:
        """End the process, and what it has started and left."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


class Run:
    """The budget, the report, and the parts that are still ahead."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic() - max(0.0, time.time() - options.started)
        self.folder = Path(options.base, options.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = Text(self.folder / "log.txt")
        self.steps: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        self.child: Child | None = None
        self.ahead: list[plan.Part] = []
        self.words: deque[str] = deque(maxlen=2000)
        self.save()

    def seconds(self) -> float:
        """Return the seconds since gpu.sh was started."""
        return time.monotonic() - self.started

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return 60 * self.options.minutes - RESERVE - self.seconds()

    def say(self, text: str) -> None:
        """Print a line of progress with the time, and keep it in the log."""
        line = f"[{self.seconds():6.1f} s] {text}"
        print(line, flush=True)
        self.log.add(line)

    def save(self) -> None:
        """Write gpu.json."""
        content = {
            "question": QUESTION,
            "settings": {**vars(self.options), "seconds": round(self.seconds(), 1)},
            "environment": self.results.get("environment", [None])[-1],
            "steps": self.steps,
            "results": {k: v for k, v in self.results.items() if k != "environment"},
        }
        text = json.dumps(strict(content), indent=1, allow_nan=False)
        replace_text(self.folder / "gpu.json", f"{text}\n")

    def is_due(self, part: plan.Part) -> bool:
        """Tell whether a budget has this part; a trial of smaller sizes has all sooner."""
        return self.options.minutes * self.options.scale >= part.from_minutes

    def chosen(self, program: plan.Program) -> list[plan.Part]:
        """Return the parts that are run: those that are due, and others where time is left over."""
        parts = []
        for part in program.parts:
            if program.tool and not shutil.which(program.tool):
                self.ahead = [p for p in self.ahead if p is not part]
                self.leave_out(part, f"{program.tool} is not on PATH")
            elif part in self.ahead:
                parts.append(part)
            elif self.left() >= STARTING + part.least + sum(p.least for p in self.ahead):
                self.ahead.append(part)
                parts.append(part)
            else:
                self.leave_out(part, f"it is for budgets from {part.from_minutes:g} minutes on")
        return parts

    def limit_of(self, part: plan.Part) -> float:
        """Return the seconds that a part may take, so that those behind it get theirs.

        Where there is too little for all of them, the first come first.
        """
        later = sum(p.least for p in self.ahead if p is not part)
        left = self.left()
        return min(part.most, left, max(part.least, left - later))

    def begin(self, part: plan.Part) -> None:
        """Record that a part runs."""
        self.words.clear()
        self.steps.append({"name": part.name, "status": "running", "at": round(self.seconds(), 1)})
        self.say(f"{part.name} begins")
        self.save()

    def finish(self, status: str, reason: str = "") -> None:
        """Record how the part that runs has ended."""
        step = self.steps[-1]
        step |= {"status": status, "seconds": round(self.seconds() - step["at"], 1)}
        if reason:
            step |= {"reason": reason, "last_lines": list(self.words)[-WORDS:]}
        self.say(f"{step['name']}: {status} in {step['seconds']:.1f} s{reason and ': '}{reason}")
        self.save()

    def leave_out(self, part: plan.Part, reason: str) -> None:
        """Record that a part is not run."""
        self.steps.append({"name": part.name, "status": "left out", "reason": reason})
        self.say(f"{part.name}: left out: {reason}")
        self.save()

    def everything(self) -> None:
        """Run the plan."""
        programs = plan.programs(self.options)
        self.ahead = [part for program in programs for part in program.parts if self.is_due(part)]
        for program in programs:
            if program.kept_as:
                (self.folder / program.kept_as).unlink(missing_ok=True)
            self.run_program(program)

    def run_program(self, program: plan.Program) -> None:
        """Run the parts of a program, in as many processes as that takes."""
        parts = self.chosen(program)
        while parts:
            if self.left() < 1:
                self.ahead.remove(parts[0])
                self.leave_out(parts.pop(0), "no time is left")
                continue
            self.run_process(program, parts)

    def run_process(self, program: plan.Program, parts: list[plan.Part]) -> None:
        """Run a process until it ends or a part fails; takes from `parts` what needs no more."""
        names = [part.name for part in parts] if program.is_sectioned else []
        kept = Text(self.folder / program.kept_as) if program.kept_as else self.log
        self.begin(parts[0])
        # What a sectioned program loads before its first part is no part's time.
        limit = min(90, self.left() / 2) if names else self.limit_of(parts[0])
        deadline = time.monotonic() + limit
        self.child = Child([*program.command, *names], plan.environment(program))
        status, reason = "", ""
        while not status:
            try:
                line = self.child.next_line(deadline)
            except queue.Empty:
                status, reason = "out of time", f"it may take {limit:.0f} s"
                break
            if line is None:
                code = self.child.process.wait()
                status = "failed" if code or names else "done"
                last = next((word for word in reversed(self.words) if word.strip()), "")
                reason = f"it ended with {code}: {last}" if status == "failed" else ""
            elif line.startswith("@begin "):
                limit = self.limit_of(parts[0])
                deadline = time.monotonic() + limit
                self.child.tell(f"{limit:.1f}")
            elif line.startswith("@end "):
                self.finish("done")
                self.ahead.remove(parts.pop(0))
                if not parts:
                    break
                self.begin(parts[0])
                deadline = time.monotonic() + 30
            else:
                self.take(line, kept)
        self.child.kill()
        self.child = None
        if parts:
            if program.digest:
                self.results[parts[0].name] = program.digest(self.words)
            self.finish(status, reason)
            self.ahead.remove(parts.pop(0))

    def take(self, line: str, kept: Text) -> None:
        """Take a line of a program: a result, a line of progress, or words for the log."""
        if line.startswith("@record "):
            name, _, text = line.removeprefix("@record ").partition(" ")
            with suppress(ValueError):  # of a process that died in the middle of it
                self.results.setdefault(name, []).append(json.loads(text))
            self.save()
        elif line.startswith("@say "):
            self.say(line.removeprefix("@say "))
        elif not line.startswith("USDT:"):  # torch's profiler
            self.words.append(line[:WIDTH])
            kept.add(line)

    def interrupted(self) -> None:
        """End what runs, and record it."""
        if self.child is not None:
            self.child.kill()
        if self.steps and self.steps[-1]["status"] == "running":
            self.finish("interrupted")


def strict(value: Any) -> Any:
    """Return a value without NaN and infinities, which JSON has not: their names in their place."""
    if isinstance(value, dict):
        return {name: strict(one) for name, one in value.items()}
    if isinstance(value, list):
        return [strict(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def positive(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return value


def main() -> None:
    """Read the command line and run everything."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=QUESTION)
    parser.add_argument(
        "--minutes", type=positive, default=9, help="for everything, build included"
    )
    parser.add_argument("--output", default=str(plan.HERE.parent / "results/gpu"), help="a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide sizes, to try the script")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("--base", default="", help=argparse.SUPPRESS)  # of a relative output
    run = Run(parser.parse_args())

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    try:
        run.everything()
    finally:
        run.interrupted()
        run.save()
    for step in run.steps:
        run.say(f"{step['name']:<12} {step['status']:<12} {step.get('reason', '')[:90]}")
    run.say(f"written to {run.folder}")


if __name__ == "__main__":
    main()
