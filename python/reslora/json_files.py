"""Reading JSON that others wrote: what is no JSON object is one sentence."""

from __future__ import annotations

import json
import os
from typing import Any


def read_object(path: str | os.PathLike[str], op: str) -> dict[str, Any]:
    """Return the JSON object in a file; `op` begins the sentence of an error."""
    if os.path.isdir(path):
        raise ValueError(f"[{op}] a JSON file is read; got the folder {os.fspath(path)}")
    with open(path, "rb") as file:
        return parse_object(file.read(), os.fspath(path), op)


def parse_object(text: str | bytes, source: str, op: str) -> dict[str, Any]:
    """Return the JSON object in a text; `source` names the text in an error."""
    try:
        values = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"[{op}] {source} must be UTF-8; got {error.reason} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"[{op}] {source} must be JSON; got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"[{op}] {source} must be a JSON object; got {type(values).__name__}")
    return values
