"""Writes the study's page, tables and picture from its lines, so that no figure is typed by hand.

python benchmarks/paper/report.py           # writes README.md here, and what it shows
python benchmarks/paper/report.py --check   # exit code 1 where they say something else

Tables and picture lie beside the lines, in results/paper/. The page says how many lines of each
task it was made of; a check takes so many of them, since a study that runs adds others meanwhile.
Times to a loss are given where results/paper/step_times.json, a result of bench_step.py, is there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from comparison import settings_of, unique  # noqa: E402
from lines import Line, read  # noqa: E402
from page import answer, main_table, protocol  # noqa: E402
from picture import is_of, points_of, save  # noqa: E402
from sections import filled  # noqa: E402
from tables import details  # noqa: E402

COUNT = re.compile(r"<!-- (\d+) lines of (\w+) -->")


class Report:
    """What the lines of all tasks say, as texts and a picture.

    Args:
        grid: what is planned.
        lines: of each task.
        times: a result of bench_step.py, or None.
    """

    def __init__(
        self, grid: dict[str, Any], lines: dict[str, list[Line]], times: dict[str, Any] | None
    ) -> None:
        every = [line for own in lines.values() for line in own]
        self.counts = {task: len(own) for task, own in lines.items()}
        self.grid, self.lines = grid, unique(every)
        self.repeated = len(every) - len(self.lines)
        self.settings = list(settings_of(self.lines, grid))
        self.details = details(self.settings, grid, times)
        self.points = points_of(self.settings, grid)

    def page(self, text: str) -> str:
        """Return the page with its sections written anew."""
        sections = {
            "answer": lambda: answer(self.settings, self.lines, self.grid),
            "table": lambda: main_table(self.settings),
            "protocol": self._protocol,
        }
        return filled(text, sections)

    def _protocol(self) -> str:
        counts = [f"<!-- {count} lines of {task} -->" for task, count in self.counts.items()]
        return "\n".join([protocol(self.lines, self.repeated, self.grid), *counts])


def planned_tasks(grid: dict[str, Any]) -> list[str]:
    """Return the tasks of the grid that the report is about, in its order."""
    return list(dict.fromkeys(setting.task for setting in settings_of([], grid)))


def read_report(options: argparse.Namespace, counts: dict[str, int] | None = None) -> Report:
    """Return the report of all lines, or of so many of each task."""
    grid = json.loads(options.grid.read_text())
    lines = {task: read(options.results / f"{task}.jsonl") for task in planned_tasks(grid)}
    if counts is not None:
        lines = {task: own[: counts.get(task, 0)] for task, own in lines.items()}
    path = options.step_times or options.results / "step_times.json"
    is_there = options.step_times or path.exists()
    return Report(grid, lines, json.loads(path.read_text()) if is_there else None)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    parser.add_argument("--grid", type=Path, default=HERE / "grid.json")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results/paper")
    parser.add_argument("--page", type=Path, default=HERE / "README.md")
    parser.add_argument("--step-times", type=Path, help="a result file of bench_step.py")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Write or check all; return the exit code."""
    options = parse(arguments)
    tables, picture = options.results / "tables.md", options.results / "differences.svg"
    try:
        text = options.page.read_text()
        if options.check:
            counts = {task: int(count) for count, task in COUNT.findall(text)}
            report = read_report(options, counts)
            is_fresh = report.page(text) == text and is_of(picture, report.points)
            return int(not is_fresh or tables.read_text() != report.details)
        report = read_report(options)
        save(report.points, picture)
        tables.write_text(report.details)
        options.page.write_text(report.page(text))
    except (OSError, ValueError, ImportError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
