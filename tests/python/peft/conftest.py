"""A base model and its input, for the tests of the method of PEFT."""

import pytest
import torch
from models import tiny_llama, tokens


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture
def ids():
    torch.manual_seed(5)
    return tokens()
