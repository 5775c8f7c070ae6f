"""What the tests of devices share: which kernels of ours ran, and how near results are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OWN = re.compile(r"reslora::(?:\w+::|\(anonymous namespace\)::)*(\w+)_kernel\b")


def ran(device: str, work: Callable[[], Any]) -> tuple[Any, set[str]]:
    """Run a work; return what it returns, and the names of our kernels in a GPU's trace."""
    if device == "cpu":
        return work(), set()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        result = work()
        torch.cuda.synchronize()
    keys = (event.key for event in traced.key_averages() if event.device_type == DeviceType.CUDA)
    return result, {match[1] for match in map(OWN.search, keys) if match}


def assert_near(
    got: Iterable[torch.Tensor], want: Iterable[torch.Tensor], share: float = 0.01
) -> None:
    """Demand errors of at most a share of the largest element.

    A GPU's library may sum in another order on another stream, or while a graph is recorded.
    """
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        error = (g.double() - w.double()).abs().max().item()
        assert error <= share * w.abs().max().item(), f"result {number} is off by {error}"
