"""Prints which requirements on stdin, one a line, this interpreter does not meet.

    <interpreter> tests/lacking.py <requirements.txt           # absent, or of another version
    <interpreter> tests/lacking.py --any-version <bounds.txt   # absent

So that a script takes what is there, and asks pip for the rest only.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from pip._vendor.packaging.requirements import Requirement

# Programs that serve as well where they are not installed as Python packages.
PROGRAMS = ("cmake", "ninja")


def installed_version(name: str) -> str | None:
    """Return the version of a package, or of a program that takes its place; None for neither."""
    try:
        return version(name)
    except PackageNotFoundError:
        if name not in PROGRAMS or not shutil.which(name):
            return None
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else None


def is_lacking(requirement: Requirement, any_version: bool) -> bool:
    """Return whether a requirement is not met; with `any_version` its range does not matter."""
    found = installed_version(requirement.name)
    if found is None or any_version:
        return found is None
    return not requirement.specifier.contains(found, prereleases=True)


def main(any_version: bool) -> None:
    """Print the lines of stdin that are not met; comments and empty lines are left out."""
    for line in sys.stdin.read().splitlines():
        text = line.partition("#")[0].strip()
        if text and is_lacking(Requirement(text), any_version):
            print(text)


if __name__ == "__main__":
    main("--any-version" in sys.argv[1:])
