"""One module object at several places: adapted at each, once in files, right after merging."""

import copy
import warnings

import pytest
import torch
from models import Block, randomize
from torch import nn

import reslora

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft import PeftModel, get_peft_model  # noqa: E402

from reslora.peft import PeftLinear, ResLoraConfig  # noqa: E402


class Twice(nn.Module):
    """A linear layer that hangs at two places, between others."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first, self.entry = shared, nn.Linear(4, 4)
        self.rest = nn.ModuleList([nn.Linear(4, 4), shared])

    def forward(self, x):
        for layer in (self.entry, self.first, *self.rest):
            x = torch.tanh(layer(x))
        return x


def with_a_block_twice():
    block = Block(4)
    return nn.Sequential(block, Block(4), block)


MODELS = [(Twice, ["first", "entry"]), (with_a_block_twice, ["lin"])]


def made(make, targets, res_mode):
    """The base, its adapted twins by PEFT and in the core with the same adapters."""
    torch.manual_seed(0)
    base = make()
    options = {"r": 2, "target_modules": targets, "res_mode": res_mode}
    model = randomize(get_peft_model(copy.deepcopy(base), ResLoraConfig(**options))).eval()
    return base, model


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(("make", "targets"), MODELS)
@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_a_module_at_two_places_is_the_same_in_both(tmp_path, make, targets, res_mode):
    base, model = made(make, targets, res_mode)
    x = torch.randn(3, 4)
    wanted = model(x)
    model.save_pretrained(tmp_path)
    core = reslora.load(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(core(x), wanted, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(read(x), wanted, rtol=0, atol=0)
    reslora.save_pretrained(core, tmp_path / "core")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "core").eval()
    torch.testing.assert_close(again(x), wanted, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(("make", "targets"), MODELS)
@pytest.mark.parametrize("res_mode", ["none", "bs"])
def test_a_module_at_two_places_is_merged_and_unloaded(make, targets, res_mode):
    base, model = made(make, targets, res_mode)
    x = torch.randn(3, 4)
    wanted = model(x)
    plain = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-6)
    plain = model.unload()
    torch.testing.assert_close(plain(x), base.eval()(x), rtol=0, atol=0)
    for left in (plain, copy.deepcopy(plain)):
        kinds = [type(child) for parent in left.modules() for child in parent._modules.values()]
        assert PeftLinear not in kinds
    if make is Twice:
        assert plain.first is plain.rest[1]
