"""inject: which modules are adapted, which chains they form, and how failures are undone."""

import copy

import pytest
import torch
from models import Net, adapted, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens
from torch import nn

from reslora import (
    ResLoraConfig,
    ResLoraLinear,
    disable_adapter,
    inject,
    print_links,
    print_trainable_parameters,
    unload,
)
from reslora.injection.adapted import find_layers, injection_of


def names(model):
    return [name for name, m in model.named_modules() if isinstance(m, ResLoraLinear)]


def chains(model):
    return {chain.key: chain.names for chain in injection_of(model, "test").chains}


def snapshot(model):
    """All that a failed injection must leave as it was."""
    return (
        [(name, id(m), type(m)) for name, m in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


# ---- Targets


def test_suffixes_match_whole_parts_of_a_name():
    model = inject(tiny_bert(), ResLoraConfig(target_modules=["query", "output.dense"]))
    found = names(model)
    assert sum(name.endswith(".query") for name in found) == 3
    assert "bert.encoder.layer.0.attention.output.dense" in found
    assert "bert.encoder.layer.0.output.dense" in found
    assert len(found) == 9  # "dense" alone, as in intermediate.dense, is no suffix of these


def test_a_part_of_a_word_is_no_match():
    with pytest.raises(ValueError, match=r"got 'proj', which matches nothing \(candidates: q_proj"):
        inject(tiny_llama(), ResLoraConfig(target_modules=["proj"]))


def test_a_regular_expression_must_match_the_whole_name():
    config = ResLoraConfig(target_modules=r".*\.[02]\.self_attn\.(q|v)_proj")
    found = names(inject(tiny_llama(), config))
    assert found == [
        f"model.layers.{n}.self_attn.{kind}_proj" for n in (0, 2) for kind in ("q", "v")
    ]
    with pytest.raises(ValueError, match="matches nothing"):
        inject(tiny_llama(), ResLoraConfig(target_modules="q_proj"))


def test_all_linear_leaves_out_the_output_head():
    found = names(inject(tiny_llama(), ResLoraConfig(target_modules="all-linear")))
    assert len(found) == 3 * 7 and "lm_head" not in found
    found = names(inject(tiny_gpt2(), ResLoraConfig(target_modules="All-Linear")))
    assert len(found) == 3 * 4 and "lm_head" not in found


def test_all_linear_leaves_out_modules_to_save():
    config = ResLoraConfig(target_modules="all-linear", modules_to_save=["classifier"])
    model = inject(tiny_bert(), config)
    assert "classifier" not in names(model)
    assert model.classifier.weight.requires_grad and model.classifier.bias.requires_grad


def test_exclude_modules_and_layers_to_transform():
    config = ResLoraConfig(
        target_modules="all-linear",
        exclude_modules=["mlp.up_proj", "o_proj"],
        layers_to_transform=1,
    )
    found = names(inject(tiny_llama(), config))
    assert {name.split(".")[2] for name in found} == {"1"}
    assert {name.rsplit(".", 1)[1] for name in found} == {
        "q_proj", "k_proj", "v_proj", "gate_proj", "down_proj",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="excluded nothing"):
        inject(tiny_llama(), ResLoraConfig(target_modules=["q_proj"], exclude_modules=["nope"]))


def test_layers_pattern_says_which_number_is_the_layers():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList(Net(depth=3) for _ in range(2))

        def forward(self, x):
            return sum(tower(x) for tower in self.towers)

    options = {"target_modules": ["lin"], "layers_to_transform": [1], "res_mode": "none"}
    first = names(inject(Towers(), ResLoraConfig(**options)))
    assert first == [f"towers.1.layers.{n}.lin" for n in range(3)]
    second = names(inject(Towers(), ResLoraConfig(**options, layers_pattern="layers")))
    assert second == [f"towers.{n}.layers.1.lin" for n in range(2)]


def test_rank_and_alpha_patterns():
    config = ResLoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True,
        rank_pattern={r"layers\.1\..*": 2, "q_proj": 3}, alpha_pattern={"v_proj": 5},
    )  # fmt: skip
    model = inject(tiny_llama(), config)
    layers = [block.self_attn for block in model.model.layers]
    assert [layer.q_proj.r for layer in layers] == [3, 2, 3]
    assert [layer.v_proj.r for layer in layers] == [4, 2, 4]
    assert layers[1].v_proj.wiring.scaling[0] == pytest.approx(5 / 2**0.5)
    assert layers[2].q_proj.wiring.scaling[0] == pytest.approx(8 / 3**0.5)


def test_conv1d_of_gpt2_is_adapted():
    model = tiny_gpt2()
    ids = tokens()
    want = model(ids).logits
    inject(model, ResLoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
    layer = model.transformer.h[0].attn.c_attn
    assert layer.reslora_A.shape == (2, 16) and layer.reslora_B.shape == (48, 2)
    torch.testing.assert_close(model(ids).logits, want)


def test_experts_and_attention_projections_are_left_out_of_all_linear():
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(4, 2),
        "experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)),
        "lin": nn.Linear(4, 4),
    })  # fmt: skip
    with pytest.warns(UserWarning, match="leaves out 3 layers"):
        inject(model, ResLoraConfig(target_modules="all-linear", res_mode="none"))
    assert names(model) == ["lin"]


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
        ({}, "target_modules must be given; got None"),
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


# ---- Chains


def test_chains_of_t5_keep_encoder_decoder_and_cross_attention_apart():
    model = inject(tiny_t5(), ResLoraConfig(target_modules=["q", "v", "wi"]))
    found = chains(model)
    assert set(found) == {
        f"{side}.block.*.layer.{place}"
        for side, place in [
            ("encoder", "0.SelfAttention.q"), ("encoder", "0.SelfAttention.v"),
            ("encoder", "1.DenseReluDense.wi"), ("decoder", "0.SelfAttention.q"),
            ("decoder", "0.SelfAttention.v"), ("decoder", "1.EncDecAttention.q"),
            ("decoder", "1.EncDecAttention.v"), ("decoder", "2.DenseReluDense.wi"),
        ]
    }  # fmt: skip
    assert found["decoder.block.*.layer.1.EncDecAttention.q"] == [
        f"decoder.block.{n}.layer.1.EncDecAttention.q" for n in range(3)
    ]
    roots = {session.root_name for session in injection_of(model, "test").sessions}
    assert roots == {"encoder", "decoder"}


def test_the_root_is_the_nearest_ancestor_that_is_called():
    model = inject(tiny_llama(), ResLoraConfig(target_modules=["q_proj"]))
    assert [s.root_name for s in injection_of(model, "test").sessions] == ["model"]
    model = inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), ResLoraConfig(
        target_modules="all-linear"))  # fmt: skip
    assert [s.root_name for s in injection_of(model, "test").sessions] == [""]
    assert chains(model) == {"*": ["0", "1"]}


def test_a_mixed_sequential_is_one_chain():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    inject(model, ResLoraConfig(target_modules="all-linear"))
    assert chains(model) == {"*": ["0", "2", "4"]}


def test_untargeted_layers_do_not_cut_a_chain():
    config = ResLoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2])
    model = inject(tiny_llama(), config)
    assert model.model.layers[2].self_attn.q_proj.wiring.taps == [0]


def test_without_any_link_inject_says_so():
    with pytest.warns(UserWarning, match="no two adapted layers are linked"):
        inject(nn.ModuleDict({"a": nn.Linear(3, 3)}), ResLoraConfig(target_modules=["a"]))


def test_print_links_shows_chains_and_links_broken_by_shapes(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 6))
    text = print_links(inject(model, ResLoraConfig(target_modules="all-linear")))
    assert text == capsys.readouterr().out.rstrip("\n")
    assert "*: is, 3 layers, 1 linked" in text and "0: first of its chain" in text
    assert "2 is not linked to 1: in_features 6 and 4 differ" in text


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


def test_what_mamba_does_not_call_is_not_adapted():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32
    )
    model = transformers.MambaForCausalLM(config)
    for name in ("dt_proj", "out_proj"):
        with pytest.raises(ValueError, match=f"linear layers that are called; got .*{name}"):
            inject(model, ResLoraConfig(target_modules=[name]))
    with pytest.warns(UserWarning, match="leaves out 4 layers of experts, or that are not called"):
        inject(model, ResLoraConfig(target_modules="all-linear", res_mode="bs"))
    ids = torch.randint(40, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.reslora_B.grad.any() for layer in find_layers(model))
