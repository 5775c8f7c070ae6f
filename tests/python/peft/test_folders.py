"""Folders of the plug-in whose config the core would refuse: their chains say what is adapted."""

import copy

import pytest
import torch
from models import SPECIAL, randomize, tiny_llama, tokens

import reslora
from reslora.files.model_folder import merge_folder
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from peft_models import logits, wrapped  # noqa: E402

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def mixtral():
    config = transformers.MixtralConfig(**SIZES | SPECIAL, num_local_experts=2)
    return transformers.MixtralForCausalLM(config).eval()


def phi3():
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES | SPECIAL)).eval()


# The model, what the core would refuse of it, how many layers PEFT adapts.
CONFIGS = {
    "mixtral": (mixtral, {"target_modules": SEVEN}, 12),
    "phi3": (phi3, {"target_modules": SEVEN}, 6),
    "gate": (tiny_llama, {"target_modules": ["q_proj", "gate"]}, 3),
    "head": (tiny_llama, {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 1]},
             3),
    "index": (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [1, 9]}, 1),
    "pattern": (tiny_llama, {"target_modules": ["q_proj"], "rank_pattern": {"zzz": 3}}, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_plug_in_saves_is_loaded_and_merged_by_the_core(tmp_path, name):
    make, options, count = CONFIGS[name]
    torch.manual_seed(0)
    base, ids = make(), tokens()
    model = wrapped(copy.deepcopy(base), res_mode="bs", **options)
    assert len(find_layers(model)) == count
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    loaded = reslora.load(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, ids), wanted, rtol=0, atol=0)
    reslora.save_pretrained(loaded, tmp_path / "again")
    loaded = reslora.load(copy.deepcopy(base), tmp_path / "again")
    torch.testing.assert_close(logits(loaded, ids), wanted, rtol=0, atol=0)
    base.save_pretrained(tmp_path / "base")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_model_of_another_depth_is_refused(tmp_path, layers):
    wrapped(mixtral(), target_modules=SEVEN).save_pretrained(tmp_path)
    config = transformers.MixtralConfig(**SIZES | SPECIAL, num_local_experts=2)
    config.num_hidden_layers = layers
    other = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match=f"with {layers} layers in the model and 3 in the file"):
        reslora.load(other, tmp_path)
    assert not find_layers(other)


def test_single_layers_by_their_paths_are_merged_into_files(tmp_path):
    """Other layers of the chain are no sign of another base."""
    base, ids = tiny_llama(), tokens()
    config = reslora.ResLoraConfig(
        r=2, target_modules=["model.layers.0.self_attn.q_proj"], res_mode="none"
    )
    model = randomize(reslora.inject(copy.deepcopy(base), config), 0.2)
    reslora.save_pretrained(model, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
