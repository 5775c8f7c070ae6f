"""Saving, loading, merging and exporting models of get_peft_model."""

import copy
import json

import pytest
import torch
from models import tiny_bert, tiny_gpt2, tiny_llama, tokens

import reslora

peft = pytest.importorskip("peft", reason="peft is not installed")
from huggingface_hub import ModelCard  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from peft_models import TARGETS, logits, wrapped  # noqa: E402

from reslora.peft import PeftLinear, ResLoraConfig  # noqa: E402


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_save_and_from_pretrained(base, ids, tmp_path, name, low_cpu_mem_usage):
    model = wrapped(copy.deepcopy(base), name, rank_pattern={"layers.0.self_attn.q_proj": 2})
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    read = PeftModel.from_pretrained(
        copy.deepcopy(base), folder, adapter_name="mine", low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits(read, ids), wanted, rtol=0, atol=0)
    assert not any(p.requires_grad for p in read.parameters())
    again = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    assert any(p.requires_grad for p in again.parameters())
    config = peft.PeftConfig.from_pretrained(folder)
    assert isinstance(config, ResLoraConfig)
    assert config.peft_type == "RESLORA" == config.peft_type.value
    assert (config.r, config.res_mode, config.target_modules) == (4, "ms", TARGETS)


def test_reslora_and_peft_read_each_others_folders(base, ids, tmp_path):
    model = wrapped(copy.deepcopy(base))
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path / "peft")
    read = reslora.load(copy.deepcopy(base), tmp_path / "peft")
    torch.testing.assert_close(logits(read, ids), wanted, rtol=0, atol=0)
    for source in (model, read):
        reslora.save_pretrained(source, tmp_path / "own", statistics=False)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own")
        torch.testing.assert_close(logits(again, ids), wanted, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "peft")  # again: the card is not written twice
    card = ModelCard.load(tmp_path / "peft" / "README.md")
    assert card.text.count("import reslora.peft") == 1 and "reslora" in card.data.tags


def test_the_command_reads_what_peft_wrote(base, ids, tmp_path, capsys):
    from reslora.commands.cli import main

    base.save_pretrained(tmp_path / "base")
    model = wrapped(copy.deepcopy(base), res_mode="bs", pre_num=2)
    model.save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *arguments]) == 0
    capsys.readouterr()
    merged = type(base).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_auto_peft_model(base, ids, tmp_path):
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    model = wrapped(model, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    read = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=0, atol=0)
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_trained_head_is_saved_and_loaded(ids, tmp_path):
    torch.manual_seed(0)
    base = tiny_bert()
    model = wrapped(
        copy.deepcopy(base), target_modules=["query", "value"], task_type="SEQ_CLS", res_mode="is"
    )
    heads = [n for n, p in model.named_parameters() if p.requires_grad and "reslora" not in n]
    assert heads
    assert all("classifier.modules_to_save.default" in name for name in heads)
    wanted = logits(model, ids)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(read, ids), wanted, rtol=0, atol=0)
    reslora.save_pretrained(model, tmp_path / "own")
    own = reslora.load(copy.deepcopy(base), tmp_path / "own")
    torch.testing.assert_close(logits(own, ids), wanted, rtol=0, atol=0)
    reslora.merge(model, "weight")
    merged = logits(model, ids)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain, ids), merged)
    assert not any("modules_to_save" in name for name, _ in plain.named_modules())


# ---- Merging ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 0), ("bs", 2)])
def test_exact_merges_change_nothing(base, ids, res_mode, pre_num):
    model = wrapped(copy.deepcopy(base), res_mode=res_mode, pre_num=pre_num)
    wanted = logits(model, ids)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, PeftLinear))
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(base)
    torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-5)
    assert not any("reslora" in name for name, _ in plain.named_modules())
    assert not hasattr(plain, "peft_config")
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_approximate_merges_are_those_of_reslora(base, ids):
    batches = [{"input_ids": tokens(4, 9)} for _ in range(4)]
    for how in ("peft", "reslora", "unload"):
        torch.manual_seed(3)
        model = wrapped(copy.deepcopy(base))
        if how == "reslora":
            plain = reslora.merge_and_unload(model, data=batches)
        elif how == "peft":
            reslora.calibrate(model, batches)
            plain = model.merge_and_unload()
        else:
            reslora.merge(model, data=batches)
            plain = model.merge_and_unload()
        assert type(plain) is type(base)
        if how == "peft":
            wanted = logits(plain, ids)
        torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-5, atol=1e-6)


def test_unload_gives_the_base_model_back(base, ids):
    for unload in (lambda m: m.unload(), reslora.unload):
        model = wrapped(copy.deepcopy(base), res_mode="bs")
        model.merge_adapter()
        plain = unload(model)
        torch.testing.assert_close(logits(plain, ids), logits(base, ids), rtol=0, atol=0)
        assert type(plain) is type(base)


def test_one_layer_is_not_merged_alone(base):
    model = wrapped(copy.deepcopy(base))
    layer = next(m for m in model.modules() if isinstance(m, PeftLinear))
    with pytest.raises(ValueError, match="merge_adapter of the PEFT model"):
        layer.merge()


@pytest.mark.parametrize(("res_mode", "make"), [("bs", tiny_llama), ("bs", tiny_gpt2)])
def test_convert_to_lora(ids, res_mode, make):
    convert_to_lora = pytest.importorskip("peft", minversion="0.19").convert_to_lora
    torch.manual_seed(0)
    base = make()
    targets = ["q_proj", "v_proj"] if make is tiny_llama else ["c_attn", "c_fc"]
    model = wrapped(copy.deepcopy(base), target_modules=targets, res_mode=res_mode, pre_num=1)
    config, tensors = convert_to_lora(model, rank=8)
    lora = get_peft_model(copy.deepcopy(base), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(logits(lora, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)  # the plan that served all layers is not in the way
    torch.testing.assert_close(logits(twin, ids), logits(model, ids), rtol=0, atol=0)


def test_export_lora_of_a_peft_model(base, ids, tmp_path):
    model = wrapped(copy.deepcopy(base), res_mode="bs", pre_num=1)
    reslora.export_lora(model, tmp_path)
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert read.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_finish_is_kept_in_the_saved_config(base, ids, tmp_path):
    model = wrapped(copy.deepcopy(base))
    reslora.finish(model, [{"input_ids": tokens(4, 9)} for _ in range(4)], step=7)
    assert model.peft_config["default"].res_mode == "none"
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(read, ids), logits(model, ids))
    assert read.peft_config["default"].finished_from == "ms"
    own = reslora.load(copy.deepcopy(base), tmp_path)  # the chains in the file are the new ones
    torch.testing.assert_close(logits(own, ids), logits(model, ids))
