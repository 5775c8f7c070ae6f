"""Writes the list of functions and data that libreslora.so exports to exported_symbols.txt.

    python tests/data/make_symbols.py

What is inline in a header (weak in the library) is left out: compilers differ there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from reslora import _C

LIST = Path(__file__).with_name("exported_symbols.txt")


def exported() -> list[str]:
    """Return the demangled names that programs can link to."""
    library = Path(_C.__file__).parent / "libreslora.so"
    printed = subprocess.check_output(["nm", "-DC", "--defined-only", library], text=True)
    rows = [line.split(" ", 2) for line in printed.splitlines()]
    return sorted({name for _, kind, name in rows if kind in "TDBR"})


if __name__ == "__main__":
    LIST.write_text("\n".join(exported()) + "\n")
