"""Sums up what ctest and pytest wrote, and decides the exit code of tests/run.sh.

    python tests/summary.py <folder with ctest.xml, gtest/ and pytest.xml>

Prints failed tests and skips with their reasons, and ends with `N passed, N failed, N skipped`. A
skip whose reason is not in ALLOWED_SKIPS counts as failed. A file that is absent or empty counts as
one failure: the program that should have written it crashed.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

# What CI may lack. Everything else must be there, so skipping for another reason is a failure.
ALLOWED_SKIPS = (
    r"\bdata\b.*\b(absent|not found)\b",  # the folder of data sets beside the checkout
    r"no CUDA (device|toolkit)",
    r"no limits for CUDA compiler",  # instructions are counted for one release
)


@dataclass
class Tally:
    """What one or more result files say."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        """Count a skip, as a failure where ALLOWED_SKIPS does not list its reason."""
        if any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS):
            self.skipped.append(f"{name}: {reason}")
        else:
            self.failed.append(f"{name}: skipped without leave ({reason})")


def skip_reason(case: ElementTree.Element) -> str | None:
    """Return why a test case was skipped, or None where it ran."""
    skipped = case.find("skipped")
    if skipped is None and case.get("status") not in ("disabled", "notrun"):
        return None
    reason = "" if skipped is None else (skipped.get("message") or skipped.text or "")
    lines = reason.strip().splitlines() or ["no reason given"]
    return lines[-1]  # GoogleTest puts the place of the skip on a line above its reason


def add(case: ElementTree.Element, tally: Tally) -> None:
    """Add one test case of a JUnit file to the tally."""
    name = "::".join(dict.fromkeys(filter(None, (case.get("classname"), case.get("name")))))
    reason = skip_reason(case)
    if case.find("failure") is not None or case.find("error") is not None:
        tally.failed.append(name)
    elif reason is not None:
        tally.skip(name, reason)
    else:
        tally.passed += 1


def cases_of(path: Path, tally: Tally) -> list[ElementTree.Element]:
    """Return the test cases of a JUnit file; one failure where it holds none."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        tally.failed.append(f"{path.name} could not be read ({error}): its program did not finish")
        return []
    if not cases:
        tally.failed.append(f"{path.name} holds no test")
    return cases


def read(path: Path, tally: Tally) -> None:
    """Add the test cases of a JUnit file to the tally."""
    for case in cases_of(path, tally):
        add(case, tally)


def read_ctest(folder: Path, tally: Tally) -> None:
    """Add what ctest ran: a GoogleTest program by its own cases, anything else as one case."""
    for case in cases_of(folder / "ctest.xml", tally):
        own = folder / "gtest" / f"{case.get('name')}.xml"
        if not own.exists():
            add(case, tally)
            continue
        before = len(tally.failed)
        read(own, tally)
        if case.find("failure") is not None and len(tally.failed) == before:
            tally.failed.append(f"{case.get('name')} failed after its last test")


def main(folder: Path) -> int:
    """Print the summary of a results folder; return the exit code."""
    tally = Tally()
    read_ctest(folder, tally)
    read(folder / "pytest.xml", tally)
    if (folder / "style.txt").exists():
        tally.failed.append("style (its sentences stand above)")
    for line in tally.failed:
        print(f"FAILED  {line}")
    for line in tally.skipped:
        print(f"skipped  {line}")
    print(f"{tally.passed} passed, {len(tally.failed)} failed, {len(tally.skipped)} skipped")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/summary.py <folder with ctest.xml, gtest/ and pytest.xml>")
    sys.exit(main(Path(sys.argv[1])))
