"""Ctrl-C at any point: one sentence, exit code 130, and nothing half-done is left.

    interrupts.watch("quickstart")                    # first of all, before slow imports
    with interrupts.temporary(out) as folder:         # out/.unfinished-…, removed however this ends
        ...
        with interrupts.held():                       # a few renames that belong together
            ...

An exception that is raised at an interrupt does not reach the end everywhere: libraries that are
being imported turn it into another one, destructors swallow it, C++ code aborts. So nothing is
raised. The handler removes the temporary folders itself and ends the process. So it does where the
process is asked to end (SIGTERM) and where its terminal is closed (SIGHUP).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

PREFIX = ".unfinished-"
# Not every system has SIGHUP.
_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
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
        with ExitStack() as stack:
            with suppress(OSError):  # some file systems have no locks
                stack.enter_context(_locked(folder))
            yield folder
    finally:
        _remove(folders)
        _temporary.remove(folders)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; OSError where another process does, and where there is none."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders of processes that were killed: nobody holds their locks."""
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            # A new one is locked a moment after it is made.
            if left.stat().st_mtime < time.time() - 60:
                with _locked(left):
                    shutil.rmtree(left, ignore_errors=True)


def _remove(folders: list[Path]) -> None:
    """Remove the last with all that it holds, then each above it if it is empty."""
    *above, last = folders
    shutil.rmtree(last, ignore_errors=True)
    for folder in reversed(above):
        with suppress(OSError):
            folder.rmdir()
