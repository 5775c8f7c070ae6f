"""Ctrl-C at any point: one sentence, exit code 130, and nothing half-done is left.

    interrupts.watch("quickstart")                    # first of all, before slow imports
    with interrupts.temporary(out) as folder:         # out/.unfinished-…, removed however this ends
        ...
        with interrupts.held():                       # a few renames that belong together
            ...

An exception that is raised at an interrupt does not reach the end everywhere: libraries that are
being imported turn it into another one, destructors swallow it, C++ code aborts. So nothing is
raised. The handler removes the temporary folders itself and ends the process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PREFIX = ".unfinished-"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_program = ""
_temporary: list[list[Path]] = []  # the folders of each `temporary`, the outermost first
_is_held = False
_waiting: int | None = None


def watch(program: str) -> None:
    """From now on end the process in one sentence; a signal that is ignored stays so."""
    global _program
    _program = program
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, _: FrameType | None) -> None:
    global _waiting
    if _is_held:
        _waiting = number
        return
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    for folders in reversed(_temporary):
        _remove(folders)
    with suppress(Exception):  # what is being written just now cannot be flushed
        sys.stdout.flush()
    sentence = (
        f"\n{_program}: interrupted; nothing half-done is left, a later run starts cleanly.\n"
    )
    with suppress(OSError):
        os.write(2, sentence.encode())
    os._exit(128 + number)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until the end of the block."""
    global _is_held
    _is_held = True
    try:
        yield
    finally:
        _is_held = False
        if _waiting is not None:
            _stop(_waiting, None)


@contextmanager
def temporary(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent`, and what lacks above it; remove it at the end.

    Those above it that were made and have stayed empty are removed as well.

    Raises:
        OSError: where it cannot be made. Nothing is left then.
    """
    folder = parent.absolute() / f"{PREFIX}{os.urandom(4).hex()}"
    absent = [path for path in reversed(folder.parents) if not path.exists()]
    folders = [*absent, folder]
    _temporary.append(folders)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        _remove(folders)
        _temporary.remove(folders)


def _remove(folders: list[Path]) -> None:
    """Remove the last with all that it holds, then each above it if it is empty."""
    *above, last = folders
    shutil.rmtree(last, ignore_errors=True)
    for folder in reversed(above):
        with suppress(OSError):
            folder.rmdir()
