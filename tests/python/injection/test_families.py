"""Tiny random models of many families: chains and links by hand, training, merging, exporting."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from models import (
    SPECIAL,
    clip_batch,
    fit,
    tiny_bert,
    tiny_clip,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    tokens,
)  # fmt: skip
from torch import nn

import reslora
from reslora.injection.adapted import find_layers, injection_of
from reslora.merging.batches import main_output

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip


def causal(name, **options):
    def make():
        config = getattr(transformers, f"{name}Config")(**SIZES | SPECIAL | options)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def encoder(name, **options):
    def make():
        sizes = SIZES | {"max_position_embeddings": 40, "num_labels": 3}
        config = getattr(transformers, f"{name}Config")(**sizes | SPECIAL | options)
        return getattr(transformers, f"{name}ForSequenceClassification")(config)

    return make


def bart():
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
        decoder_start_token_id=2, forced_eos_token_id=2, max_position_embeddings=40, **SPECIAL,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=12, attention_head_dim=4,
        norm_num_groups=4,
    )  # fmt: skip


def dit():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=3,
    )  # fmt: skip


def lm_batch():
    ids = tokens(4, 8)
    return {"input_ids": ids, "labels": ids}


def class_batch():
    return {"input_ids": tokens(4, 8), "labels": torch.tensor([0, 1, 2, 0])}


def image_batch():
    return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}


def unet_batch():
    return {
        "sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }  # fmt: skip


def dit_batch():
    return {
        "hidden_states": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }  # fmt: skip


def chains(*paths, layers=3):
    return dict.fromkeys(paths, layers)


SELF = ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]
PARTS = ("model.encoder.layers.*.self_attn", "model.decoder.layers.*.self_attn",
         "model.decoder.layers.*.encoder_attn")  # fmt: skip
T5 = ("encoder.block.*.layer.0.SelfAttention", "decoder.block.*.layer.0.SelfAttention",
      "decoder.block.*.layer.1.EncDecAttention")  # fmt: skip
# At each resolution a chain of its own, in the order of execution.
UNET = {
    f"{level}.attentions.*.transformer_blocks.*.{attention}.{own}": count
    for level, count in (("down_blocks.0", 2), ("down_blocks.1", 2), ("mid_block", 1),
                         ("up_blocks.0", 3), ("up_blocks.1", 3))
    for attention in ("attn1", "attn2")
    for own in ("to_q", "to_v")
}  # fmt: skip

# name: how to make it, what it is called with, its chains by hand
FAMILIES = {
    "llama": (tiny_llama, lm_batch, chains(*SELF)),
    "mistral": (
        causal("Mistral", num_key_value_heads=2, sliding_window=4),
        lm_batch,
        chains(*SELF),
    ),
    "qwen2": (causal("Qwen2", num_key_value_heads=2), lm_batch, chains(*SELF)),
    "qwen3": (causal("Qwen3", num_key_value_heads=2, head_dim=4), lm_batch, chains(*SELF)),
    "gemma": (causal("Gemma", num_key_value_heads=1, head_dim=4), lm_batch, chains(*SELF)),
    "phi": (causal("Phi"), lm_batch, chains(*SELF)),
    "phi3": (
        causal("Phi3", num_key_value_heads=2),
        lm_batch,
        chains("model.layers.*.self_attn.qkv_proj"),
    ),
    "mixtral": (
        causal("Mixtral", num_key_value_heads=2, num_local_experts=2),
        lm_batch,
        chains(*SELF),
    ),
    "gpt2": (tiny_gpt2, lm_batch, chains("transformer.h.*.attn.c_attn")),
    "bert": (
        tiny_bert,
        class_batch,
        chains(*(f"bert.encoder.layer.*.attention.self.{own}" for own in ("query", "value"))),
    ),
    "roberta": (
        encoder("Roberta"),
        class_batch,
        chains(*(f"roberta.encoder.layer.*.attention.self.{own}" for own in ("query", "value"))),
    ),
    "deberta": (
        encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        class_batch,
        chains(
            *(
                f"deberta.encoder.layer.*.attention.self.{own}"
                for own in ("query_proj", "value_proj")
            )
        ),
    ),
    "t5": (tiny_t5, lm_batch, chains(*(f"{part}.{own}" for part in T5 for own in "qv"))),
    "bart": (
        bart,
        lm_batch,
        chains(*(f"{part}.{own}" for part in PARTS for own in ("q_proj", "v_proj"))),
    ),
    "vit": (tiny_vit, image_batch, None),  # its paths differ between versions of transformers
    "clip": (
        tiny_clip,
        clip_batch,
        chains(
            *(
                f"{part}_model.encoder.layers.*.self_attn.{own}"
                for part in ("text", "vision")
                for own in ("q_proj", "v_proj")
            )
        ),
    ),
    "unet": (unet, unet_batch, UNET),
    "dit": (dit, dit_batch, chains(*(f"transformer_blocks.*.attn1.{o}" for o in ("to_q", "to_v")))),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_of_the_vocabulary(family):
    """What a model does with an id outside of it is nobody's promise."""
    config = FAMILIES[family][0]().config
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        given = part if isinstance(part, Mapping) else part.to_dict()
        ids = {name: value for name, value in given.items() if name.endswith("token_id")}
        size = given.get("vocab_size", 0)
        assert not {name: value for name, value in ids.items() if value and value >= size}, part


def loss_of(model: nn.Module, batch):
    output = model(**batch)
    loss = getattr(output, "loss", None)
    return main_output(output)[0].square().mean() if loss is None else loss


@pytest.mark.parametrize("res_mode", ["is", "bs", "ms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_linked_trained_merged_and_exported(tmp_path, family, res_mode):
    make, make_batch, wanted = FAMILIES[family]
    torch.manual_seed(0)
    base = make().eval()
    batch = make_batch()
    config = reslora.ResLoraConfig(r=4, lora_alpha=8, res_mode=res_mode)
    model = reslora.inject(copy.deepcopy(base), config)
    injection = injection_of(model, "test")
    found = {chain.key: chain for chain in injection.chains}
    if wanted is not None:
        assert {key: len(chain.names) for key, chain in found.items()} == wanted
    for chain in injection.chains:  # every layer but the first is linked to the one before
        linked = [list(chain.links.reached(n)) for n in range(len(chain.names))]
        assert linked == [[], *([n] for n in range(len(chain.names) - 1))]

    def loss_in_step(model):
        torch.manual_seed(1)  # the same dropout of the model's own in each step
        return loss_of(model, batch)

    losses = fit(model.train(), loss_in_step, steps=12, lr=3e-2)
    assert losses[-1] < losses[0]
    assert all(layer.reslora_B.any() for layer in find_layers(model))
    model.eval()
    for layer in find_layers(model):  # no link was broken on the way
        assert not layer.compiled_break and all(not why for _, why in layer.link_use)
    given = {key: value for key, value in batch.items() if key != "labels" or family == "t5"}
    exact = res_mode == "bs"
    report = reslora.merge_report(model, [given], "exact" if exact else "input")
    assert report.rounding_error < 1e-4
    assert report.method_error < 1e-4 if exact else math.isfinite(report.method_error)
    assert len(report.layers) == len(find_layers(model))
    reslora.export_lora(model, tmp_path, "exact" if exact else "input")
    merged = reslora.merge_and_unload(model, "exact" if exact else "input")
    read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        a, b = (main_output(m(**given))[0] for m in (merged, read.get_base_model()))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
