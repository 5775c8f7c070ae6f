"""The lines of a study: one finished run each, in one JSON file for each task.

A line is written by one append under a lock of the file, so that several processes and a kill leave
whole lines. The file is opened anew each time: it may be replaced between two runs (by git, say).
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What tells one run from all others."""

    task: str
    method: str
    rank: int
    rate: float
    seed: int
    phase: str

    def __str__(self) -> str:
        """Return what progress shows."""
        rank = f" r {self.rank}" if self.rank else ""
        rate = f", rate {self.rate:g}" if self.rate else ""
        return f"{self.task} {self.phase}: {self.method}{rank}{rate}, seed {self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Return the first keys of the run's line."""
        return asdict(self)


def run_of(line: Line) -> Run:
    """Return which run a line is of."""
    return Run(**{name: line[name] for name in Run.__dataclass_fields__})


def read(path: Path) -> list[Line]:
    """Return the lines of a file, none where there is no file; an unfinished last one is left out.

    Raises:
        ValueError: where another line than the last is not whole.
    """
    if not path.exists():
        return []
    found = []
    whole = path.read_bytes().split(b"\n")[:-1]
    for number, text in enumerate(whole, 1):
        try:
            found.append(json.loads(text))
        except ValueError:
            raise ValueError(f"{path.name} must hold JSON lines; line {number} is none") from None
    return found


def append(path: Path, line: Line) -> bool:
    """Write a line at the end of a file; return False where one of the same run is there already.

    Raises:
        ValueError: where a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(line, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _drop_unfinished(file)
        if run_of(line) in map(run_of, read(path)):
            return False
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    return True


def _drop_unfinished(file: BinaryIO) -> None:
    """Cut off what a killed writer or a full disk left after the last whole line."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        file.truncate(end)
