"""inject: what it refuses and leaves as it was, what it changes, and how that is undone."""

import copy

import pytest
import torch
from models import Net, adapted, tiny_bert, tiny_llama
from torch import nn

from reslora import (
    ResLoraConfig,
    ResLoraLinear,
    disable_adapter,
    inject,
    print_trainable_parameters,
    unload,
)
from reslora.injection.adapted import find_layers, injection_of


def snapshot(model):
    """All that a failed injection must leave as it was."""
    return (
        [(name, id(m), type(m)) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


# ---- Refusals: one sentence, nothing changed


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(8, 4)
        self.conv = nn.Conv2d(1, 1, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.q = nn.Linear(4, 4)
        self.k = nn.LazyLinear(4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "target_modules must be given; got none"),
        ({"target_modules": ["zzz"]}, "got 'zzz', which matches nothing"),
        ({"target_modules": ["q", "zzz"]}, "got 'zzz', which matches nothing"),
        ({"target_modules": ".*zzz"}, "matches nothing"),
        ({"target_modules": ["emb", "q", "conv"]}, r"emb \(Embedding\), conv \(Conv2d\)"),
        ({"target_modules": ["out_proj"]}, "attention.out_proj"),
        ({"target_modules": ["k"]}, r"k \(LazyLinear\)"),
        ({"target_modules": ["q"], "exclude_modules": ["q"]}, "none that is not excluded"),
        ({"target_modules": ["q"], "modules_to_save": ["head"]}, "modules_to_save must match"),
        ({"target_modules": ["q"], "rank_pattern": {"v": 2}}, "rank_pattern must match"),
        ({"target_modules": ["q"], "alpha_pattern": {"v": 2}}, "alpha_pattern must match"),
        ({"target_modules": ["q"], "layers_to_transform": [3]}, r"layers that have targets.*\[3\]"),
    ],
)
def test_bad_targets_are_refused(options, sentence):
    model = Mixed()
    before = snapshot(model)
    with pytest.raises(ValueError, match=sentence) as caught:
        inject(model, ResLoraConfig(**options))
    assert "\n" not in str(caught.value) and snapshot(model) == before


def test_an_adapted_model_is_refused():
    model = adapted(Net())
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapted already"):
        inject(model, ResLoraConfig(target_modules=["lin"]))
    assert snapshot(model) == before


def test_a_model_with_lora_of_peft_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must not hold adapters of PEFT"):
        inject(model, ResLoraConfig(target_modules=["q_proj"]))


def test_a_config_made_bad_after_its_check_is_refused():
    config = ResLoraConfig(target_modules=["lin"])
    config.r = 0
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="r must be at least 1"):
        inject(model, config)
    assert snapshot(model) == before


def test_a_failure_half_way_restores_the_model(monkeypatch):
    from reslora.injection import inject as injection

    model = Net()
    model.layers[1].lin.weight.requires_grad_(False)
    before = snapshot(model)

    def fail(*args):
        raise MemoryError("planted")

    monkeypatch.setattr(injection, "warn_without_links", lambda _: None)
    monkeypatch.setattr(injection, "saved_parameters", fail)
    with pytest.raises(MemoryError, match="planted"):
        inject(model, ResLoraConfig(target_modules=["lin"]))
    assert snapshot(model) == before


def test_strict_links_refuses_unequal_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    before = snapshot(model)
    with pytest.raises(ValueError, match="strict_links"):
        inject(model, ResLoraConfig(target_modules="all-linear", strict_links=True))
    assert snapshot(model) == before


@pytest.mark.parametrize("buffer", [torch.zeros(2, dtype=torch.complex64), torch.empty(0)])
def test_heads_that_no_file_can_hold_are_refused_before_the_training(buffer):
    model = tiny_bert()
    model.classifier.register_buffer("table", buffer)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"modules_to_save must fit .*classifier\.table"):
        inject(model, ResLoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert snapshot(model) == before


# ---- What is changed, and undone


def test_only_adapters_and_saved_modules_train():
    config = ResLoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = inject(tiny_bert(), config)
    training = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"reslora_A", "reslora_B", "weight", "bias"}
    rest = {
        name for name, p in model.named_parameters() if p.requires_grad and "reslora" not in name
    }
    assert rest == {"classifier.weight", "classifier.bias"}


def test_print_trainable_parameters(capsys):
    text = print_trainable_parameters(inject(Net(6, 2), ResLoraConfig(r=2, target_modules=["lin"])))
    assert text == "trainable params: 48 || all params: 132 || trainable%: 36.3636"
    assert capsys.readouterr().out == text + "\n"


def test_the_given_config_is_copied():
    config = ResLoraConfig(r=2, target_modules=["lin"])
    model = inject(Net(), config)
    config.r, config.target_modules = 5, ["x"]
    own = injection_of(model, "test").config
    assert own.r == 2 and own.target_modules == ["lin"]


def test_unload_restores_the_model_exactly():
    model = Net()
    model.layers[1].lin.bias.requires_grad_(False)
    before = snapshot(model)
    assert unload(adapted(model)) is model
    assert snapshot(model) == before and not find_layers(model)
    with pytest.raises(ValueError, match="model must be adapted"):
        unload(model)


def test_a_module_with_two_names_is_replaced_at_both():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    inject(model, ResLoraConfig(target_modules=["a"], res_mode="none"))
    assert model["a"] is model["b"][0] and isinstance(model["a"], ResLoraLinear)
    unload(model)
    assert model["a"] is shared and model["b"][0] is shared


def test_adapters_take_device_and_precision_of_the_base():
    model = inject(Net().to(torch.bfloat16), ResLoraConfig(target_modules=["lin"]))
    assert model.layers[0].lin.reslora_A.dtype == torch.float32
    model = inject(Net().double(), ResLoraConfig(target_modules=["lin"]))
    assert model.layers[0].lin.reslora_B.dtype == torch.float64
    with torch.device("meta"):
        model = Net()
    inject(model, ResLoraConfig(target_modules=["lin"]))
    assert model.layers[0].lin.reslora_A.is_meta


@pytest.mark.parametrize("how", [True, "gaussian"])
def test_step_zero_is_the_base_model(how):
    for mode in ("none", "is", "bs", "ms"):
        model, x = Net(), torch.randn(3, 6)
        want = model(x)
        inject(model, ResLoraConfig(target_modules=["lin"], res_mode=mode, init_lora_weights=how))
        assert torch.equal(model(x), want), mode
        assert model.layers[0].lin.reslora_A.any() and not model.layers[0].lin.reslora_B.any()


def test_random_initialisation_is_no_base_model():
    model, x = Net(), torch.randn(3, 6)
    want = model(x)
    inject(model, ResLoraConfig(target_modules=["lin"], init_lora_weights=False))
    assert not torch.allclose(model(x), want)


def test_disable_adapter_runs_the_base_model_and_records_nothing():
    model, x = Net(), torch.randn(3, 6)
    want = model(x)
    adapted(model)
    with disable_adapter(model) as same:
        assert same is model and torch.equal(model(x), want)
        with disable_adapter(model):
            pass
        assert torch.equal(model(x), want)
    assert not torch.allclose(model(x), want)
    layer = model.layers[1].lin
    assert layer.norm_count.item() == 1 and layer.link_use == {(True, ""): 1}
    with pytest.raises(RuntimeError, match="planted"), disable_adapter(model):
        raise RuntimeError("planted")
    assert not layer.is_disabled


def test_a_copy_is_independent():
    model, x = adapted(), torch.randn(3, 6, dtype=torch.float64)
    want = model(x)
    other = copy.deepcopy(model)
    assert injection_of(other, "test") is not injection_of(model, "test")
    with torch.no_grad():
        model.layers[0].lin.reslora_A.zero_()
    assert torch.equal(other(x), want)
    unload(other)
    assert not other._forward_hooks and not other._forward_pre_hooks
    assert model._forward_hooks and find_layers(model)
