"""Progress bars: tqdm where they are wanted, nothing where they are not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


def bar(shown: bool, description: str, total: int | None = None, **options: Any) -> Any:
    """Return a tqdm bar to be updated by hand, disabled unless `shown`."""
    from tqdm import tqdm

    return tqdm(desc=description, total=total, disable=not shown, file=sys.stderr, **options)


def progress(source: Iterable[Any], description: str, shown: bool) -> Iterator[Any]:
    """Iterate over `source` with a bar."""
    yield from bar(shown, description, iterable=source)
