"""Base layers whose output does not follow what a merge writes into their weight."""

from __future__ import annotations

import pytest
import torch
from models import Net, randomize
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import reslora
from reslora import ResLoraConfig, inject
from reslora.injection.adapted import find_layers


class Halved(nn.Linear):
    """A linear layer that does not compute x W^T + b."""

    def forward(self, x):
        return functional.linear(x, self.weight * 0.5, self.bias)


class Same(nn.Linear):
    """A class of its own that does."""

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


def scaled(layer, args, output):
    return 1.5 * output


def seen(layer, args, output):
    return None


def with_class(kind):
    def change(block):
        lin = kind(block.lin.in_features, block.lin.out_features)
        lin.load_state_dict(block.lin.state_dict())
        block.lin = lin

    return change


MADE_ELSEWHERE = {
    "weight_norm": lambda block: parametrizations.weight_norm(block.lin),
    "spectral_norm": lambda block: parametrizations.spectral_norm(block.lin),
    "old weight_norm": lambda block: nn.utils.weight_norm(block.lin),
    "pruned": lambda block: prune.l1_unstructured(block.lin, "weight", amount=0.5),
}
OTHERS = {
    "class": with_class(Halved),
    "hook": lambda block: block.lin.register_forward_hook(scaled),
}
LINEAR = {
    "class": with_class(Same),
    "hook": lambda block: block.lin.register_forward_hook(seen),
}


def adapted(change, mode="is"):
    model = Net()
    for block in model.layers:
        change(block)
    return randomize(inject(model, ResLoraConfig(target_modules=["lin"], res_mode=mode)))


@pytest.mark.parametrize("change", [*MADE_ELSEWHERE.values(), *OTHERS.values()])
@pytest.mark.parametrize("mode", ["none", "is"])
def test_a_base_that_does_not_follow_its_weight_is_not_merged(change, mode):
    model = adapted(change, mode)
    x = torch.randn(5, 6)
    before = model.eval()(x)
    for merge in (reslora.merge, reslora.merge_and_unload):
        with pytest.raises(ValueError, match=r"x W\^T \+ b with a weight of its own.*layers.0.lin"):
            merge(model, "weight")
    with pytest.raises(ValueError, match=r"^\[merge_report\].*export_lora"):
        reslora.merge_report(model, [x], "weight")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("change", LINEAR.values())
def test_a_class_or_a_hook_that_changes_nothing_is_merged(change):
    model = adapted(change, "bs")
    x = torch.randn(5, 6)
    wanted = model.eval()(x)
    reslora.merge(model)
    torch.testing.assert_close(model(x), wanted)


class Router(nn.Linear):
    """A layer that returns more than one tensor, as routers of some models do."""

    def forward(self, x):
        out = super().forward(x)
        return out, out.softmax(-1)


class Llama4Router(Router):
    """Known by its name."""


def test_layers_that_return_more_are_left_out_or_refused_in_a_sentence():
    class Model(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.lin, self.router = nn.Linear(4, 4), kind(4, 4)

        def forward(self, x):
            return self.router(self.lin(x))[0]

    model = inject(Model(Llama4Router), ResLoraConfig(target_modules="all-linear"))
    assert [layer.name for layer in find_layers(model)] == ["lin"]
    with pytest.raises(ValueError, match="router"):
        inject(Model(Llama4Router), ResLoraConfig(target_modules=["router"]))
    other = inject(Model(Router), ResLoraConfig(target_modules=["router"]))
    with pytest.raises(ValueError, match=r"must return one tensor; got tuple from Router \(layer"):
        other(torch.ones(2, 4))
