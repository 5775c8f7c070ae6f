"""inject: which modules a config means, by PEFT's rules for names."""

import warnings

import pytest
import torch
from models import Towers, tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn

from reslora import ResLoraConfig, ResLoraLinear, inject
from reslora.injection.adapted import find_layers


def names(model):
    return [name for name, m in model.named_modules() if isinstance(m, ResLoraLinear)]


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(tiny_llama(), ResLoraConfig(target_modules=["q_proj"], exclude_modules=[]))


def test_layers_pattern_says_which_number_is_the_layers():
    options = {"target_modules": ["lin"], "layers_to_transform": [1], "res_mode": "none"}
    first = names(inject(Towers(), ResLoraConfig(**options)))
    assert first == [f"towers.1.layers.{n}.lin" for n in range(3)]
    second = names(inject(Towers(), ResLoraConfig(**options, layers_pattern="layers")))
    assert second == [f"towers.{n}.layers.1.lin" for n in range(2)]


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


def test_what_mamba_does_not_call_is_not_adapted():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, intermediate_size=32
    )
    model = transformers.MambaForCausalLM(config)
    for name in ("x_proj", "dt_proj", "out_proj"):
        with pytest.raises(ValueError, match=f"linear layers that are called; got .*{name}"):
            inject(model, ResLoraConfig(target_modules=[name]))
    with pytest.warns(UserWarning, match="leaves out 6 layers of experts, or that are not called"):
        inject(model, ResLoraConfig(target_modules="all-linear", res_mode="bs"))
    ids = torch.randint(40, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.reslora_B.grad.any() for layer in find_layers(model))


SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
STATES = SIZES | {
    "num_key_value_heads": 1, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
    "mamba_n_groups": 1,
}  # fmt: skip
WAVLM = SIZES | {
    "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
# The name of the config, the model's, its options, a target that is read without a call.
READ_BY_HAND = [
    ("WavLM", "Model", WAVLM, "q_proj"),
    ("WavLM", "Model", WAVLM, "out_proj"),
    ("Bamba", "ForCausalLM", STATES | {"mamba_expand": 2, "attn_layer_indices": [1]}, "out_proj"),
    ("FalconH1", "ForCausalLM", STATES | {"mamba_d_ssm": 32}, "out_proj"),
    (
        "MobileBert",
        "ForMaskedLM",
        SIZES | {"intra_bottleneck_size": 8, "embedding_size": 8},
        "predictions.dense",
    ),
]


@pytest.mark.parametrize(("name", "kind", "options", "target"), READ_BY_HAND)
def test_what_is_read_by_hand_is_not_adapted(name, kind, options, target):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from reslora.peft import ResLoraConfig as PeftConfig

    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}{kind}")(config)
    with pytest.raises(ValueError, match=f"linear layers that are called; got .*{target}"):
        inject(model, ResLoraConfig(target_modules=[target]))
    with pytest.raises(ValueError, match=rf"{target}, in \w+, which does not call it"):
        peft.get_peft_model(model, PeftConfig(target_modules=[target]))
    with pytest.warns(UserWarning, match="or that are not called"):
        inject(model, ResLoraConfig(target_modules="all-linear", res_mode="bs"))
    left_out = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert any(name.endswith(target) for name in left_out)
