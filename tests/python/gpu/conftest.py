"""The devices of these tests.

A test with the fixture `device` runs on the CPU, too, so that the test itself is tried everywhere.
Where there is a GPU our kernels are forced, so that none passes on ATen's form unseen.
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    os.environ["RESLORA_KERNELS"] = "fused"  # before the first op
ON_GPU = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cuda() -> str:
    """Skip where there is no GPU: for what the CPU has nothing like."""
    if not HAS_GPU:
        pytest.skip("no CUDA device")
    return "cuda"
