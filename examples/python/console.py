"""Talking to the person at the terminal: errors of theirs in one sentence, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


class UserError(Exception):
    """A request that cannot be served; the message is one sentence, shown without a traceback."""


def progress_bar(steps: Iterable[int], name: str) -> tqdm:
    """Return a bar over `steps`; where no terminal looks, it prints a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(steps, desc=name, unit="step", dynamic_ncols=True, mininterval=interval)
