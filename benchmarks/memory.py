"""How much memory a piece of work holds at most, and what it saves for the backward pass."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def changes_of(work: Callable[[], Any]) -> list[int]:
    """Return what the CPU allocator gave (bytes > 0) and took back (< 0) in `work`, in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]


def allocations(work: Callable[[], Any]) -> list[int]:
    """Return the size of every allocation of `work`."""
    return [change for change in changes_of(work) if change > 0]


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most bytes that were held at once above where `work` began."""
    return max(accumulate(changes_of(work), initial=0))


def return_memory_at_once() -> None:
    """Let what is freed leave the process at once, for `peak_resident_bytes` (glibc).

    Blocks of 64 KiB and more are mapped one by one from now on, which makes allocating slow; cycles
    (recomputes leave some) are collected early, or peaks would be those of the collector's mood.
    """
    gc.set_threshold(20, 2, 2)
    library = ctypes.CDLL(None)
    library.mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD
    library.malloc_trim(0)


def peak_resident_bytes(work: Callable[[], Any]) -> int:
    """Return by how much the process grew at most in `work`, for work too long for a profile.

    Linux counts the peak; call `return_memory_at_once` before.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{name}:\s*(\d+) kB", status)
    assert match is not None, status
    return 1024 * int(match.group(1))


def saved_bytes(work: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves in `work`, beyond the storage of `known` tensors."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = work()
    del kept
    return sum(sizes.values())
