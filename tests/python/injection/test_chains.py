"""inject: which chains the adapted layers form, with which rank, scaling and root."""

import pytest
from models import tiny_llama, tiny_t5
from torch import nn

from reslora import ResLoraConfig, inject, print_links
from reslora.injection.adapted import injection_of


def chains(model):
    return {chain.key: chain.names for chain in injection_of(model, "test").chains}


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


def test_print_links_shows_chains_and_links_broken_by_shapes(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 6))
    text = print_links(inject(model, ResLoraConfig(target_modules="all-linear")))
    assert text == capsys.readouterr().out.rstrip("\n")
    assert "*: is, 3 layers, 1 linked" in text and "0: first of its chain" in text
    assert "2 is not linked to 1: in_features 6 and 4 differ" in text
