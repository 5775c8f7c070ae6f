"""What every Python test shares: a fixed seed, few programs on PATH, and a fresh compiler."""

import os
import signal

import pytest
import torch

# A shell that runs the tests in the background lets its children ignore Ctrl-C, and theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a developer's machine has, and neither tests/run.sh nor a minimal Debian with g++ brings.
HIDDEN = ("make", "gmake", "git", "curl", "wget")


@pytest.fixture(autouse=True, scope="session")
def bare_path(tmp_path_factory):
    """Let programs that a new machine lacks fail here too, so that no test takes them for granted.

    All else stays where it is: build folders that are kept know compilers by their paths.
    """
    folder = tmp_path_factory.mktemp("hidden")
    for name in HIDDEN:
        (folder / name).write_text(f"#!/bin/sh\necho '{name}: hidden by the tests' >&2\nexit 127\n")
        (folder / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


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
