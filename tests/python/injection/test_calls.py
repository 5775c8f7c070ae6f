"""Adapted layers are called: fused paths are left, and what a training step never calls is told."""

import copy
import warnings

import pytest
import torch
from models import Net, fit, randomize, trained
from torch import nn
from torch.nn import functional

import reslora
from reslora import ResLoraConfig, inject
from reslora.injection.adapted import find_layers, injection_of

TARGETS = ["linear1", "linear2"]


def encoder(norm_first=False):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first)


def adapt(model, how, **options):
    options = {"r": 2, "target_modules": TARGETS} | options
    if how == "inject":
        return inject(model, ResLoraConfig(**options))
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from reslora.peft import ResLoraConfig as PeftConfig

    return peft.get_peft_model(model, PeftConfig(**options))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- torch's encoder, which has a fused path in eval mode


@pytest.mark.parametrize("how", ["inject", "peft"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_torch_encoders_evaluate_their_adapters_in_eval_mode(how, norm_first, res_mode):
    torch.manual_seed(0)
    base, x = encoder(norm_first), torch.randn(2, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    model = randomize(adapt(copy.deepcopy(base), how, res_mode=res_mode))
    wanted, padded = model.train()(x), model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        model.eval()
        assert distance(base.eval()(x), wanted) > 0.1
        assert distance(model(x), wanted) < 1e-5
        masked = model(x, src_key_padding_mask=padding)
        assert distance(masked[~padding], padded[~padding]) < 1e-5
        if res_mode == "bs":
            assert distance(reslora.merge_and_unload(model)(x), wanted) < 1e-5


def test_a_classifier_on_a_torch_encoder_is_in_eval_mode_what_it_was_trained_to():
    torch.manual_seed(0)
    x, labels = torch.randn(32, 5, 8), torch.arange(32) % 2
    model = nn.Sequential(encoder(), nn.Flatten(), nn.Linear(40, 2))
    config = ResLoraConfig(r=4, target_modules=TARGETS, res_mode="is")
    model = inject(model, config).train()
    fit(model, lambda m: functional.cross_entropy(m(x), labels), steps=60, lr=3e-2)
    losses = []
    for mode in (True, False):
        with torch.no_grad():
            losses.append(functional.cross_entropy(model.train(mode)(x), labels).item())
    assert losses[0] < 0.3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    report = reslora.merge_report(model, [x], "weight")
    with torch.no_grad():
        wanted = model(x)
        error = distance(reslora.merge_and_unload(model, "weight")(x), wanted)
    assert error == pytest.approx(report.output_error, rel=1e-3)


def test_what_keeps_torch_encoders_off_the_fused_path_goes_with_the_adapter():
    model = encoder()
    inject(model, ResLoraConfig(target_modules=TARGETS, res_mode="none"))
    assert not model.use_nested_tensor and all(layer._forward_hooks for layer in model.layers)
    reslora.unload(model)
    assert model.use_nested_tensor and not any(layer._forward_hooks for layer in model.layers)
    others = inject(Net(), ResLoraConfig(target_modules=["lin"], res_mode="none"))
    assert not injection_of(others, "test").hooks


# ---- The first training step


class ByHand(nn.Module):
    """Two linear layers; `skips` says whether the weight of the second is read without a call."""

    def __init__(self, skips, name="read"):
        super().__init__()
        self.called, self.skips, self.name = nn.Linear(4, 4), skips, name
        self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        read = getattr(self, self.name)
        if self.skips:
            return functional.linear(self.called(x), read.weight, read.bias)
        return read(self.called(x))


def warnings_of_steps(model, steps, optimizer=None):
    """The sentences of each training step."""
    optimizer = optimizer or torch.optim.SGD(trained(model), lr=0.1)
    found = []
    for _ in range(steps):
        model(torch.randn(3, 4)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        optimizer.zero_grad()
        found.append([str(warning.message) for warning in caught])
    return found


@pytest.mark.parametrize("how", ["inject", "peft"])
@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_a_chain_that_is_never_called_is_told_after_the_first_step(how, res_mode):
    model = nn.Sequential(*(ByHand(skips=True) for _ in range(3)))
    model = adapt(model, how, target_modules=["called", "read"], res_mode=res_mode)
    first, *later = warnings_of_steps(model, 9)
    assert len(first) == 1 and not any(later)
    assert "must be called; got no gradient in the first step for *.read (3 layers):" in first[0]


@pytest.mark.parametrize(
    ("name", "step"), [("shared_expert", 0), ("expertise", 0), ("expert_1", 7)]
)
def test_routed_experts_alone_are_given_more_steps(name, step):
    model = nn.Sequential(*(ByHand(skips=True, name=name) for _ in range(3)))
    inject(model, ResLoraConfig(r=2, target_modules=["called", name], res_mode="none"))
    found = warnings_of_steps(model, 9)
    assert [n for n, sentences in enumerate(found) if sentences] == [step]
    assert name in found[step][0]


def test_optimizers_of_single_factors_tell_too():
    model = nn.Sequential(*(ByHand(skips=True) for _ in range(3)))
    model = adapt(model, "inject", target_modules=["called", "read"], res_mode="is")
    for factor, count in (("reslora_A", 0), ("reslora_B", 1)):
        own = [p for name, p in model.named_parameters() if factor in name]
        (sentences,) = warnings_of_steps(model, 1, torch.optim.SGD(own, lr=0.1))
        assert len(sentences) == count and all("*.read (3 layers)" in text for text in sentences)


def test_a_single_layer_that_is_never_called_is_told_after_some_steps():
    model = nn.Sequential(*(ByHand(skips=n == 2) for n in range(3)))
    inject(model, ResLoraConfig(r=2, target_modules=["called", "read"], res_mode="is"))
    found = warnings_of_steps(model, 10)
    told = [n for n, sentences in enumerate(found) if sentences]
    assert told == [7] and "no gradient in 8 steps for 2.read:" in found[7][0]


class Dropping(nn.Module):
    """Layers of which every third call leaves one out (LayerDrop), and experts used in turn."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        for n, layer in enumerate(self.layers):
            x = x if n == self.calls % 3 else layer(x)
        return self.experts[self.calls % 3](x)


def test_layers_that_are_left_out_now_and_then_are_not_told():
    targets = ["layers.0", "layers.1", "layers.2", "experts.0", "experts.1", "experts.2"]
    model = inject(Dropping(), ResLoraConfig(r=2, target_modules=targets, res_mode="none"))
    assert not any(warnings_of_steps(model, 10))


def test_only_training_steps_of_the_own_model_count():
    model = nn.Sequential(*(ByHand(skips=True) for _ in range(2)))
    inject(model, ResLoraConfig(r=2, target_modules=["called", "read"], res_mode="none"))
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    assert not any(warnings_of_steps(nn.Linear(4, 4), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # without any gradient
    assert any(warnings_of_steps(model, 1, optimizer)[0])
    other = inject(Net(4), ResLoraConfig(target_modules=["lin"]))
    assert not any(warnings_of_steps(other, 9)) and find_layers(other)


# ---- Layers that are called in training and read by hand in eval mode


def test_a_merge_report_names_what_its_batches_never_call():
    model = nn.Sequential(ByHand(skips=False), ByHand(skips=True))
    config = ResLoraConfig(r=2, target_modules=["called", "read"], res_mode="bs")
    inject(model, config)
    with pytest.warns(UserWarning, match=r"got 1 that no batch reaches: 1\.read \(their weights"):
        report = reslora.merge_report(model, [torch.randn(3, 4)])
    assert [entry.name for entry in report.layers if entry.method_error is None] == ["1.read"]
