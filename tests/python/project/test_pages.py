"""The pages for contributors name only files and folders that are there."""

from __future__ import annotations

import re

import pytest
from cpp_programs import REPOSITORY

PATH = re.compile(r"`((?:src|include|python|tests|benchmarks|examples)/[\w./-]+)`")


@pytest.mark.parametrize("page", ["ARCHITECTURE", "CONTRIBUTING"])
def test_the_paths_on_a_page_are_there(page: str) -> None:
    paths = PATH.findall((REPOSITORY / f".github/{page}.md").read_text(encoding="utf-8"))
    assert len(paths) > 5
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_the_page_of_the_architecture_names_every_room() -> None:
    page = (REPOSITORY / ".github/ARCHITECTURE.md").read_text(encoding="utf-8")
    rooms = [
        folder.relative_to(REPOSITORY)
        for top in ("src", "python/reslora")
        for folder in (REPOSITORY / top).iterdir()
        if folder.is_dir() and folder.name not in ("cmake", "__pycache__")
    ]
    assert len(rooms) > 10
    assert [str(room) for room in rooms if f"`{room}`" not in page] == []
