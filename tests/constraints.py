"""Prints what an environment holds as bounds for pip, or what moved since constraints.txt was made.

    python tests/constraints.py > tests/constraints.txt   # after RESLORA_NEWEST=1 bash tests/run.sh
    python tests/constraints.py --moved                   # one line for each package that differs

Left out are packages that torch itself binds to one version (most of NVIDIA's, triton), so that the
bounds serve with another torch too, and pip, which comes with the interpreter.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

BOUNDS = Path(__file__).with_name("constraints.txt")
LEFT_OUT = re.compile(r"(nvidia-(?!cuda-(cuobjdump|nvdisasm)$).*|cuda-.*|triton|pip|reslora)")


def installed() -> dict[str, str]:
    """Return the versions by normalised name, sorted by name."""
    found = {
        re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(): package.version
        for package in distributions()
    }
    return {name: found[name] for name in sorted(found) if not LEFT_OUT.fullmatch(name)}


def bounded() -> dict[str, str]:
    """Return the versions that constraints.txt names."""
    lines = BOUNDS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def moved() -> list[str]:
    """Return one line for each package whose version is another than the bound."""
    bounds, found = bounded(), installed()
    return [
        f"{name}: {bounds.get(name, 'no bound')} -> {version}"
        for name, version in found.items()
        if bounds.get(name) != version
    ]


def main(arguments: list[str]) -> None:
    """Print what the arguments ask for."""
    if arguments == ["--moved"]:
        print("\n".join(moved()) or "every package has the version that constraints.txt names")
        return
    if arguments:
        sys.exit(f"the only option is --moved; got {arguments[0]}")
    print("# What tests/run.sh and examples/quickstart.sh install, tried together; made by")
    print("# tests/constraints.py. `pip install .` is not bound by it.")
    for name, version in installed().items():
        print(f"{name}=={version}")


if __name__ == "__main__":
    main(sys.argv[1:])
