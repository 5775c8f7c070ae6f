"""Talking to the person at the terminal: errors of theirs in one sentence, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm


class UserError(Exception):
    """A request that cannot be served; the message is one sentence, shown without a traceback."""


def progress_bar(steps: Iterable[int], name: str) -> tqdm:
    """Return a bar over `steps`; where no terminal looks, it prints a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(steps, desc=name, unit="step", dynamic_ncols=True, mininterval=interval)


def exit_code_of(program: str, work: Callable[[], object]) -> int:
    """Run a program; say in one sentence what stopped it, 2 for a bad request, 130 for Ctrl-C."""
    try:
        work()
    except (UserError, ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    return 0
