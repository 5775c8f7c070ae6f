"""export_lora: the files mean the same to PEFT, for every shortcut and rule."""

import copy
import json

import pytest
import safetensors.torch
import torch
from models import adapted, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens
from peft import PeftConfig, PeftModel

from reslora import export_lora, merge, unmerge

CASES = [
    ("none", 1, None),
    ("bs", 1, None),
    ("bs", -1, "exact"),
    ("is", 1, "input"),
    ("is", 1, "weight"),
    ("is", 1, "factored"),
    ("ms", 2, "input"),
    ("ms", 2, "weight"),
    ("ms", -1, "factored"),
]


def logits(model, ids):
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model.eval()(**inputs).logits


def trained_model(model, **options):
    """Adapt, and run a few training forwards for the norms."""
    adapted(model, 0.15, lora_alpha=4, **options).train()
    inputs = {"input_ids": tokens()}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens()
    for _ in range(2):
        model(**inputs)
    return model.eval()


def assert_same_in_peft(model, base, folder, rule=None, ids=None):
    ids = tokens() if ids is None else ids
    state = copy.deepcopy(model.state_dict())
    export_lora(model, folder, rule)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    unmerged = logits(model, ids)
    merge(model, rule)
    want = logits(model, ids)
    unmerge(model)
    other = PeftModel.from_pretrained(base, folder)
    got = logits(other, ids)
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * scale
    return unmerged, got


@pytest.mark.parametrize(("res_mode", "pre_num", "rule"), CASES)
def test_a_causal_model(tmp_path, res_mode, pre_num, rule):
    model = tiny_llama(initializer_range=0.2)
    base = copy.deepcopy(model)
    trained_model(model, target_modules="all-linear", res_mode=res_mode, pre_num=pre_num)
    ids = tokens()
    plain = logits(base, ids)
    unmerged, got = assert_same_in_peft(model, base, tmp_path, rule, ids)
    if res_mode in ("none", "bs"):
        torch.testing.assert_close(got, unmerged, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("res_mode", ["is", "bs", "ms"])
def test_conv1d(tmp_path, res_mode):
    model = tiny_gpt2()
    base = copy.deepcopy(model)
    trained_model(model, target_modules=["c_attn", "mlp.c_proj"], res_mode=res_mode)
    assert_same_in_peft(model, base, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_ranks_that_differ_are_padded(tmp_path):
    model = tiny_llama()
    base = copy.deepcopy(model)
    options = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}, "use_rslora": True}
    targets = ["q_proj", "v_proj"]
    trained_model(model, target_modules=targets, res_mode="bs", pre_num=-1, **options)
    assert_same_in_peft(model, base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False and config["peft_type"] == "LORA"
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {8, 9}  # 8 is v_proj's output
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {9}
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors


def test_a_classification_head_goes_along(tmp_path):
    model = tiny_bert()
    base = copy.deepcopy(model)
    trained_model(model, target_modules=["query", "value"], modules_to_save=["classifier"])
    assert_same_in_peft(model, base, tmp_path)


def test_a_head_that_is_not_finite_is_not_exported(tmp_path):
    model = trained_model(tiny_bert(), target_modules=["query"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite; got NaN or .* classifier\.bias"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_encoder_decoder(tmp_path):
    model = tiny_t5()
    base = copy.deepcopy(model)
    trained_model(model, target_modules=["q", "v"], res_mode="ms")
    assert_same_in_peft(model, base, tmp_path)


def test_targets_are_short_where_that_means_the_same(tmp_path):
    model = adapted(tiny_llama(), target_modules=["q_proj", "v_proj"], res_mode="none")
    export_lora(model, tmp_path / "a", base_model_name_or_path="some/base", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "some/base" and config["task_type"] == "CAUSAL_LM"
    assert 'base_model: "some/base"' in (tmp_path / "a" / "README.md").read_text()
    model = adapted(tiny_llama(), target_modules=["q_proj"], layers_to_transform=[0, 2])
    base = tiny_llama()
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.state_dict().items()
                          if "reslora" not in k})  # fmt: skip
    assert_same_in_peft(model, base, tmp_path / "b", "weight")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 2)]


def test_peft_knows_the_revision_of_the_base(tmp_path):
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="none", revision="v2")
    export_lora(model, tmp_path, base_model_name_or_path="some/base")
    assert PeftConfig.from_pretrained(tmp_path).revision == "v2"


def test_there_is_no_revision_of_a_base_without_a_name(tmp_path):
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="none", revision="v2")
    export_lora(model, tmp_path)
    assert "v2" not in (tmp_path / "adapter_config.json").read_text()


def test_a_merged_model_exports_what_was_merged(tmp_path):
    model = tiny_llama()
    base = copy.deepcopy(model)
    trained_model(model, target_modules=["q_proj"], res_mode="is")
    merge(model, "weight")
    want = logits(model, ids := tokens())
    with pytest.raises(ValueError, match="exported as it was merged, by 'weight'; got 'input'"):
        export_lora(model, tmp_path, "input")
    assert not list(tmp_path.iterdir())
    export_lora(model, tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path), ids), want)


def test_a_black_box_base_exports_without_its_weight(tmp_path):
    class Boxed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.inner = linear

        def forward(self, x):
            return self.inner(x)

    model = tiny_llama()
    base = copy.deepcopy(model)
    for block in model.model.layers:
        block.self_attn.q_proj = Boxed(block.self_attn.q_proj)
    adapted(model, 0.2, target_modules=["q_proj"], res_mode="bs")
    export_lora(model, tmp_path)
    other = PeftModel.from_pretrained(base, tmp_path)
    ids = tokens()
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_export_warns_where_no_norms_are_at_hand(tmp_path):
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="is")
    with pytest.warns(UserWarning, match="rule 'weight' is used"):
        export_lora(model, tmp_path)
