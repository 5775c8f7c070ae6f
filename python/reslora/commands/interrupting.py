"""Ctrl-C while a command runs: a KeyboardInterrupt, but never out of an import.

An exception that is raised while a module is being imported may be lost: C++ code that imports
numpy drops it, and libraries that import lazily turn it into an error of theirs. So it is raised
where the import is over, in the function that has asked for it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .._loading import end_at_interrupt


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, where it ends the program otherwise.

    Where the program is not the command `reslora`, or Ctrl-C is ignored, nothing is changed.
    """
    if signal.getsignal(signal.SIGINT) is not end_at_interrupt:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, end_at_interrupt)


def _interrupt(_: int, frame: FrameType | None) -> None:
    importer = _importer(frame)
    if importer is None:
        raise KeyboardInterrupt
    importer.f_trace = _raise
    sys.settrace(_go_on)  # without one, Python does not call what a frame has as f_trace


def _importer(frame: FrameType | None) -> FrameType | None:
    """Return who has begun the outermost import; None where nothing is being imported."""
    importer, is_import = None, False
    while frame is not None:
        was_import, is_import = is_import, frame.f_code.co_filename.startswith("<frozen importlib")
        if was_import and not is_import:
            importer = frame
        frame = frame.f_back
    return importer


def _go_on(*_: object) -> None:
    """Serve as `sys.settrace` function of the calls that are of no interest."""


def _raise(*_: object) -> None:
    """Serve as `f_trace` of the importer, called before its next line and where it returns."""
    sys.settrace(None)
    raise KeyboardInterrupt
