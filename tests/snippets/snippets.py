"""Takes the C++ examples out of the README and the public headers, to be compiled.

    python tests/snippets/snippets.py > snippets.cpp

Each block of ```cpp in a Markdown file, and each @code block of include/reslora, becomes a function
of its own; prelude.h declares the names that they use.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of every C++ example in a file."""
    text = path.read_text(encoding="utf-8")
    pattern = (
        r"^```cpp\n(.*?)^```"
        if path.suffix == ".md"
        else r"^/// @code\{\.cpp\}\n(.*?)^/// @endcode"
    )
    for match in re.finditer(pattern, text, re.M | re.S):
        body = match.group(1)
        if path.suffix != ".md":
            body = re.sub(r"^/// ?", "", body, flags=re.M)
        yield text.count("\n", 0, match.start(1)) + 1, body


def source(tree: Path) -> str:
    """Return a program of all examples."""
    paths = [tree / "README.md", *sorted((tree / ".github").glob("*.md"))]
    paths += sorted((tree / "include/reslora").glob("*.h"))
    parts = ['#include "prelude.h"\n']
    count = 0
    for path in paths:
        for line, body in blocks(path):
            count += 1
            parts.append(f'void example_{count}() {{\n#line {line} "{path.name}"\n{body}}}\n')
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(source(REPOSITORY))
