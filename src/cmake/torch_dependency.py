"""Writes the wheel's runtime dependency: the torch minor that it is built with.

There is no C++ ABI across torch minors, so a wheel made with torch 2.15.x runs with 2.15.* only.
"""

from __future__ import annotations

from importlib.metadata import version


def dynamic_metadata(field: str, settings: dict[str, object] | None = None) -> list[str]:
    """Return the value of `project.dependencies` (called by scikit-build-core)."""
    if field != "dependencies" or settings:
        raise ValueError(
            f"torch_dependency provides 'dependencies' only; got {field!r}, {settings!r}"
        )
    major, minor = version("torch").split(".")[:2]
    return [f"torch=={major}.{minor}.*", "tqdm"]
