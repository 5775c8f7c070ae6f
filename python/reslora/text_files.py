"""Reading JSON files that others wrote; what cannot be read is one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 100  # of JSON: far more than any file has, and what every function on its values can do


def read_object(path: str | os.PathLike[str], op: str) -> dict[str, Any]:
    """Return the JSON object in a file; `op` begins the sentence of an error."""
    return _object(read_value(path, op), os.fspath(path), op)


def read_value(path: str | os.PathLike[str], op: str) -> Any:
    """Return the JSON value in a file, which need not be an object."""
    if os.path.isdir(path):
        raise ValueError(f"[{op}] a JSON file is read; got the folder {os.fspath(path)}")
    with open(path, "rb") as file:
        return _parse(file.read(), os.fspath(path), op)


def parse_object(text: str | bytes, source: str, op: str) -> dict[str, Any]:
    """Return the JSON object in a text; `source` names the text in an error."""
    return _object(_parse(text, source, op), source, op)


def _parse(text: str | bytes, source: str, op: str) -> Any:
    text = _decoded(text, source, op)
    try:
        value = json.loads(text)
        is_deep = _is_deeper(value, MAX_DEPTH)
    except json.JSONDecodeError as error:
        raise ValueError(f"[{op}] {source} must be JSON; got {error}") from None
    except RecursionError:
        is_deep = True
    except ValueError:  # what is left: Python's limit of digits
        limit = sys.get_int_max_str_digits()
        raise ValueError(
            f"[{op}] {source} must hold numbers of at most {limit:,} digits; got a longer one"
        ) from None
    if is_deep:
        raise ValueError(
            f"[{op}] {source} must be nested at most {MAX_DEPTH} deep; got JSON that is deeper"
        )
    return value


def _decoded(text: str | bytes, source: str, op: str) -> str:
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"[{op}] {source} must be UTF-8; got {error.reason} at {error.start}"
        ) from None
    if text.startswith("\ufeff"):
        raise ValueError(f"[{op}] {source} must be UTF-8 without a byte-order mark; got one")
    return text


def _is_deeper(value: Any, depth: int) -> bool:
    """Tell whether lists and objects lie more than `depth` deep in each other."""
    level = [value]
    for _ in range(depth):
        level = [own for v in level for own in _own_values(v)]
    return any(isinstance(v, dict | list) for v in level)


def _own_values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _object(values: Any, source: str, op: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"[{op}] {source} must be a JSON object; got {type(values).__name__}")
    return values
