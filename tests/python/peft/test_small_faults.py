"""What users of other libraries stumble over, and the method of PEFT must not do in silence."""

import copy
import json
import warnings
from functools import partial

import pytest
import torch
from models import adapted, tiny_llama, tokens
from older_files import rename_saved
from safetensors.torch import load_file, save_file

import reslora
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
from huggingface_hub import ModelCard  # noqa: E402
from peft_models import TARGETS, logits, wrapped  # noqa: E402

from reslora.peft import ResLoraConfig  # noqa: E402


@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_a_bias_that_is_unfrozen_by_hand_trains(res_mode):
    torch.manual_seed(0)
    model = adapted(res_mode=res_mode).train()
    x = torch.randn(3, 6, dtype=torch.float64)
    wanted = model(x).detach()
    biases = [block.lin.base_layer.bias.requires_grad_() for block in model.layers]
    y = model(x)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    step = 1e-6
    for bias in biases:
        with torch.no_grad():
            bias[2] += step
            above = model(x).square().sum()
            bias[2] -= 2 * step
            below = model(x).square().sum()
            bias[2] += step
        torch.testing.assert_close(bias.grad[2], (above - below) / (2 * step), rtol=1e-5, atol=1e-6)


SAVES = {
    "plug-in": lambda model: model.save_pretrained,
    "save": lambda model: partial(reslora.save_pretrained, model),
    "export_lora": lambda model: partial(reslora.export_lora, model),
    "export_diffusers": lambda model: partial(reslora.export_diffusers, model, component="unet"),
}


@pytest.mark.parametrize(("how", "is_wrapped"), [*((how, True) for how in SAVES), ("save", False)])
def test_what_is_unfrozen_by_hand_and_not_saved_is_named(tmp_path, how, is_wrapped):
    own = {"target_modules": TARGETS, "res_mode": "bs"}
    model = wrapped(**own) if is_wrapped else adapted(tiny_llama(), **own)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.requires_grad_()
    op = "save" if how == "plug-in" else how
    named = (
        rf"\[{op}\] what trains beside .* got 6 parameters such as model\.layers\.0\.input_layern"
    )
    with pytest.warns(UserWarning, match=named):
        SAVES[how](model)(tmp_path)


@pytest.mark.parametrize("how", ["plug-in", "save", "export_lora"])
def test_what_trains_and_is_saved_is_not_named(tmp_path, how):
    model = wrapped(res_mode="bs", modules_to_save=["norm"])
    model.get_input_embeddings().weight.requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trains beside")
        SAVES[how](model)(tmp_path, save_embedding_layers=True)
    assert "model.embed_tokens.weight" in "".join(load_file(tmp_path / "adapter_model.safetensors"))


def tiny_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["q_proj", "w1"]])
def test_fused_experts_that_are_meant_are_named(targets):
    pytest.importorskip("transformers", minversion="5")
    with pytest.warns(UserWarning, match=r"are not adapted; got 2: model\.layers\.0\.mlp\.experts"):
        peft.get_peft_model(tiny_mixtral(), ResLoraConfig(target_modules=targets))
    if targets == "all-linear":
        with pytest.warns(UserWarning, match=r"\[inject\] experts in one parameter"):
            reslora.inject(tiny_mixtral(), reslora.ResLoraConfig(target_modules=targets))


def test_experts_that_nobody_means_are_not_named(recwarn):
    peft.get_peft_model(tiny_mixtral(), ResLoraConfig(target_modules=["q_proj", "v_proj"]))
    assert not [w for w in recwarn if "experts" in str(w.message)]


def tiny_llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8)
    text = LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("has_header", [True, False])
def test_names_of_older_checkpoints_are_read(tmp_path, has_header):
    pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    base, ids = tiny_llava(), torch.randint(3, 30, (2, 7))
    model = wrapped(copy.deepcopy(base), target_modules=".*language_model.*q_proj")
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    tensors = rename_saved(tmp_path, former)
    assert all("language_model.model.layers" in key for key in tensors)
    if not has_header:  # as an older transformers has written it
        path = tmp_path / "adapter_model.safetensors"
        save_file(load_file(path), path, {"format": "pt"})
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        del config["reslora_sum"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(read, ids), wanted, rtol=0, atol=0)


def former(name):
    """Return what transformers 4 called a module, or a tensor, of a LLaVA."""
    name = name.replace("model.language_model", "language_model.model")
    return name.replace("lm_head", "language_model.lm_head")


@pytest.mark.parametrize("is_adapted", [True, False])
def test_names_of_older_checkpoints_are_read_by_the_core(tmp_path, is_adapted):
    pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "exclude_modules": ".*vision.*", "res_mode": "is"}
    base, ids = tiny_llava(), torch.randint(3, 30, (2, 7))
    model = adapted(copy.deepcopy(base), modules_to_save=["lm_head"], **options)
    model.train()(input_ids=ids)  # norms
    reslora.save_pretrained(model.eval(), tmp_path, statistics=True)
    tensors = rename_saved(tmp_path, former)
    assert "language_model.lm_head.weight" in tensors
    other = copy.deepcopy(base)
    if is_adapted:
        other = adapted(other, modules_to_save=["lm_head"], **options)
    read = reslora.load(other, tmp_path)
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=0, atol=0)
    for layer, own in zip(find_layers(read), find_layers(model), strict=True):
        assert torch.equal(layer.norms, own.norms)


def test_a_lora_of_an_older_checkpoint_is_a_start(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    base, ids = tiny_llava(), torch.randint(3, 30, (2, 7))
    targets = {"r": 2, "target_modules": ".*language_model.*q_proj"}
    config = peft.LoraConfig(**targets, lora_alpha=3, init_lora_weights=False)
    lora = peft.get_peft_model(copy.deepcopy(base), config).eval()
    lora.save_pretrained(tmp_path)
    folder = tmp_path / "adapter_model.safetensors"
    save_file({former(key): x for key, x in load_file(folder).items()}, folder, {"format": "pt"})
    model = adapted(copy.deepcopy(base), res_mode="none", **targets)
    reslora.init_from_lora(model, tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(lora, ids))


NAMES = [
    "a: b",
    "@user/base",
    "base #2",
    "-base",
    "1e3",
    'a"b',
    "C:\\b",
    "a\x7fb\x85c",
    "\u2028\ufeff",
]


@pytest.mark.parametrize("base", NAMES)
def test_the_card_names_any_base(tmp_path, base):
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="bs")
    model.config._name_or_path = base
    reslora.save_pretrained(model, tmp_path / "own", save_embedding_layers=False)
    reslora.export_lora(model, tmp_path / "lora", save_embedding_layers=False)
    for folder in ("own", "lora"):
        assert ModelCard.load(tmp_path / folder / "README.md").data.base_model == base


@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_sampling_from_an_approximate_merge_is_said_once(res_mode):
    torch.manual_seed(0)
    model = wrapped(tiny_llama(), res_mode=res_mode)
    model.train()(input_ids=tokens(), labels=tokens())  # norms
    with pytest.warns(
        UserWarning, match=r"6 of 9 layers are merged by the rule 'projected', an appr"
    ):
        model.merge_adapter()
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*approximation.*")
        model.merge_adapter()
        wrapped(tiny_llama(), res_mode="bs").merge_adapter()
