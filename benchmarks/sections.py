"""Sections of a page that a script writes: what stands between `<!-- NAME: begin -->` and end."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def filled(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """Return a page's text with every section written anew."""
    for name, make in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
    return text
