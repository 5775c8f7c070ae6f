"""Writes files whole: whoever reads one, or kills the writer, meets the old text or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Put text in the place of a file's content; what is unfinished lies beside it as `.part`."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
