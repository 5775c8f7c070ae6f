"""What every Python test shares: a fixed seed, and a fresh compiler."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    """Make random models and inputs the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """Forget compiled code, and restore the compiler's options afterwards."""
    from torch._dynamo import config

    torch._dynamo.reset()
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    before = getattr(config, name)
    yield config
    setattr(config, name, before)
    torch._dynamo.reset()
