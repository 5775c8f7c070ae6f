"""What every Python test shares: a fixed seed, few programs on PATH, and a fresh compiler."""

import os
from pathlib import Path

import pytest
import torch

# What a developer's machine has, and neither tests/run.sh nor a minimal Debian with g++ brings.
HIDDEN = {"make", "gmake", "git", "curl", "wget"}


@pytest.fixture(autouse=True, scope="session")
def bare_path(tmp_path_factory):
    """Take the programs from PATH that a new machine lacks, so that no test takes them for granted.

    A folder that holds one is replaced by links to everything else in it.
    """
    folders = []
    for number, folder in enumerate(os.get_exec_path()):
        programs = {path.name: path for path in Path(folder).glob("*")}
        if HIDDEN & programs.keys():
            folder = tmp_path_factory.mktemp(f"path{number}")
            for name in programs.keys() - HIDDEN:
                (folder / name).symlink_to(programs[name])
        folders.append(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join(folders))
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
