"""The files of benchmarks/paper as modules, which are forgotten after the tests that use them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from machine import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
PAPER = BENCHMARKS / "paper"


@contextmanager
def imported(*names: str) -> Iterator[SimpleNamespace]:
    """Import some of the files for a while; what they import of the benchmarks goes with them."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.syspath_prepend(str(PAPER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]
