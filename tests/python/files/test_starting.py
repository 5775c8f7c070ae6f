"""Starting from a plain LoRA that PEFT wrote."""

import copy
import json

import pytest
import torch
from models import SHORTCUTS, randomize, tiny_bert, tiny_llama, tokens

import reslora
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def lora(base, folder, **changes):
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(**OPTIONS | changes))
    randomize(model, 0.2).eval().save_pretrained(folder)
    return model


@pytest.fixture
def base():
    torch.manual_seed(0)
    return tiny_llama()


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"lora_alpha": 20, "alpha_pattern": {"v_proj": 3}}]
)
def test_without_a_shortcut_it_is_the_lora(tmp_path, base, changes):
    ids = tokens()
    own = lora(copy.deepcopy(base), tmp_path, **changes)
    config = reslora.ResLoraConfig(**OPTIONS, res_mode="none")
    model = reslora.inject(copy.deepcopy(base), config).eval()
    start = reslora.init_from_lora(model, tmp_path, {"input_ids": ids})
    torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-5)
    assert (start.layers, start.kind) == (6, "kl")
    assert start.distance == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS[1:-1])
def test_the_distance_is_that_to_the_lora(tmp_path, base, res_mode, pre_num):
    ids = tokens()
    own = lora(copy.deepcopy(base), tmp_path)
    config = reslora.ResLoraConfig(**OPTIONS, res_mode=res_mode, pre_num=pre_num)
    model = reslora.inject(copy.deepcopy(base), config).eval()
    start = reslora.init_from_lora(model, tmp_path, [{"input_ids": ids}])
    tensors = peft.get_peft_model_state_dict(own)
    for layer in find_layers(model):
        for name, factor in (("A", layer.reslora_A), ("B", layer.reslora_B)):
            torch.testing.assert_close(
                factor, tensors[f"base_model.model.{layer.name}.lora_{name}.weight"]
            )
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, own))
    wanted = (p.exp() * (p - q)).sum(-1).mean().item()
    assert start.distance == pytest.approx(wanted, rel=1e-3)
    assert wanted > 1e-6
    assert f"KL {start.distance:.3g} nats" in str(start)
    assert "not measured" in str(reslora.init_from_lora(model, tmp_path))


def test_a_trained_head_is_taken_over(tmp_path):
    torch.manual_seed(0)
    base = tiny_bert()
    own = lora(
        copy.deepcopy(base), tmp_path, target_modules=["query"], modules_to_save=["classifier"]
    )
    config = reslora.ResLoraConfig(
        r=4, lora_alpha=6, target_modules=["query"], modules_to_save=["classifier"], res_mode="none"
    )
    model = reslora.inject(base, config).eval()
    assert reslora.init_from_lora(model, tmp_path).heads == 2
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, own(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_peft_model_starts_from_a_lora(tmp_path, base):
    from reslora.peft import ResLoraConfig

    lora(copy.deepcopy(base), tmp_path)
    model = peft.get_peft_model(base, ResLoraConfig(**OPTIONS, res_mode="is"))
    assert reslora.init_from_lora(model, tmp_path).layers == 6
    assert all(layer.reslora_B.any() for layer in find_layers(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, r"r must be the LoRA's"),
        (
            {"target_modules": ["q_proj", "k_proj"]},
            r"got none for model\.layers\.0\.self_attn\.k_proj",
        ),
        ({"target_modules": ["q_proj"]}, r"must have every tensor of the LoRA"),
    ],
)
def test_another_adapter_is_refused_and_nothing_changes(tmp_path, base, changes, words):
    lora(copy.deepcopy(base), tmp_path)
    model = reslora.inject(base, reslora.ResLoraConfig(**OPTIONS | changes))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        reslora.init_from_lora(model, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_variants_and_other_kinds_are_refused(tmp_path, base):
    lora(copy.deepcopy(base), tmp_path, use_dora=True)
    model = reslora.inject(copy.deepcopy(base), reslora.ResLoraConfig(**OPTIONS))
    with pytest.raises(ValueError, match="plain one; got use_dora"):
        reslora.init_from_lora(model, tmp_path)
    lora(copy.deepcopy(base), tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"must begin at the base model; got one .*'pissa'"):
        reslora.init_from_lora(model, tmp_path / "pissa")
    with pytest.raises(ValueError, match=r"must hold adapter_config\.json"):
        reslora.init_from_lora(model, tmp_path / "none")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(ValueError, match="peft_type must be 'LORA'; got 'LOHA'"):
        reslora.init_from_lora(model, tmp_path)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_rank_stabilised_scaling_works_with_every_shortcut(tmp_path, base, res_mode, pre_num):
    config = reslora.ResLoraConfig(**OPTIONS, res_mode=res_mode, pre_num=pre_num, use_rslora=True)
    model = randomize(reslora.inject(copy.deepcopy(base), config), 0.1).eval()
    assert find_layers(model)[1].chain.links.layers[0].scaling == pytest.approx(6 / 4**0.5)
    ids = tokens()
    wanted = model(ids).logits
    exact = all(x.chain.merges_exactly for x in find_layers(model))
    reslora.export_lora(model, tmp_path, None if exact else "weight")
    merged = reslora.merge_and_unload(model, None if exact else "weight")
    read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(read(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-4)
    if exact:
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-3, atol=1e-4)
