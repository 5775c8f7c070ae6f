"""What the measuring programs share: the talk with run.py, sizes, and times of the device.

A part is a function of a `Session`. It is told how long it may take, hands over each result as soon
as there is one, and paces itself by the time that is left. By hand, without run.py:

    PYTHONPATH=benchmarks python benchmarks/gpu/measure.py --device cpu --scale 64 kernels
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import harness
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CALLS = 12  # of a work that is timed
ALONE = 600.0  # seconds of a part that is started by hand
CACHE = 200 << 20  # inputs of so many bytes in turn do not stay in any cache


class Session:
    """A part's device, scale, time and results."""

    def __init__(self, name: str, device: str, scale: int, seconds: float) -> None:
        self.name, self.device, self.scale = name, device, scale
        self.until = time.monotonic() + seconds

    @property
    def is_cuda(self) -> bool:
        """Tell whether a GPU is measured."""
        return self.device == "cuda"

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.monotonic()

    def size(self, n: int) -> int:
        """Return a size, divided where the script is only tried."""
        return max(16, n // self.scale)

    def record(self, fields: Mapping[str, Any]) -> None:
        """Hand a result over."""
        print(f"@record {self.name} {json.dumps(fields)}", flush=True)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        print(f"@say {text}", flush=True)


def randn(session: Session, *shape: int) -> torch.Tensor:
    """Return random bf16 numbers, made on the device."""
    return torch.randn(*shape, device=session.device, dtype=torch.bfloat16)


def copies_of(session: Session, number_of_bytes: int) -> int:
    """Return how many inputs of a size are to be used in turn."""
    return min(8, max(2, math.ceil(CACHE / number_of_bytes))) if session.is_cuda else 1


def device_seconds(session: Session, work: Callable[[int], Any]) -> dict[str, float]:
    """Return the device's seconds in one call, by kernel; on the CPU those of the call as "whole".

    `work` gets the number of the call, to take its inputs in turn.
    """
    for number in range(3):
        work(number)
    if not session.is_cuda:
        return {"whole": whole_seconds(session, work)}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        for number in range(CALLS):
            work(number)
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in traced.key_averages():
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0:
            name = kernel_name(event.key)
            found[name] = found.get(name, 0.0) + event.self_device_time_total * 1e-6 / CALLS
    # Where the driver forbids traces, the time between two events.
    return found or {"whole": whole_seconds(session, work)}


def whole_seconds(session: Session, work: Callable[[int], Any]) -> float:
    """Return the median of a work's seconds."""
    times = [harness.timed(partial(work, number), session.device) for number in range(CALLS)]
    return statistics.median(times)


def kernel_name(key: str) -> str:
    """Return the name of a kernel of ours alone, and of another what fits a line."""
    own = re.search(r"reslora::(?:[\w]+::|\(anonymous namespace\)::)*(\w+)", key)
    return f"reslora {own[1]}" if own else key[:80]


def main(parts: Mapping[str, str]) -> None:
    """Run the parts that the command line names, each with the time that run.py gives it.

    Args:
        parts: `module.function` of each name. What a module misses is the fault of its parts alone.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("names", nargs="+", choices=list(parts))
    options = parser.parse_args()
    for name in options.names:
        with suppress(Exception):  # it is raised again below
            importlib.import_module(parts[name].partition(".")[0])
    print(f"@record environment {json.dumps(harness.environment())}", flush=True)
    for name in options.names:
        print(f"@begin {name}", flush=True)
        line = "" if sys.stdin.isatty() else sys.stdin.readline()
        session = Session(name, options.device, options.scale, float(line or ALONE))
        module, _, function = parts[name].partition(".")
        getattr(importlib.import_module(module), function)(session)
        print(f"@end {name}", flush=True)
