"""Quantised bases: trained as black boxes, merged into dequantised weights, exported."""

import copy

import pytest
import torch
from models import adapted, fit, tiny_llama, tokens
from torch import nn

from reslora import (
    ResLoraConfig,
    calibrate,
    export_lora,
    inject,
    load,
    merge,
    merge_and_unload,
    merge_report,
    save_pretrained,
)
from reslora.injection.adapted import find_layers

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")


def int8_llama(**options):
    torch.manual_seed(2)
    model = tiny_llama(3, hidden_size=32, intermediate_size=48)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    options = {"target_modules": ["q_proj", "down_proj"], "res_mode": "is"} | options
    return adapted(model, 0.2, **options)


def relative(got, want):
    return ((got - want).square().sum().sqrt() / want.square().sum().sqrt()).item()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_an_int8_base_is_trained_and_merged_into_its_dequantised_weights(res_mode):
    model, ids = int8_llama(res_mode=res_mode), tokens(4, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(x.reslora_A.grad is not None for x in find_layers(model))
    want = logits(model, ids)
    layer = model.model.layers[0].mlp.down_proj
    base = layer.base_layer.weight.dequantize()
    doubled = 2 if res_mode == "is" else 1
    delta = doubled * layer.wiring.scaling[0] / doubled * (layer.reslora_B @ layer.reslora_A)
    calibrate(model, [ids], move_taps=False)  # which would change the first layer too
    merged = merge_and_unload(model, dequantize=True)
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear
    torch.testing.assert_close(merged.model.layers[0].mlp.down_proj.weight, base + delta)
    assert relative(logits(merged, ids), want) < (1e-5 if res_mode in ("none", "bs") else 0.3)
    assert (
        not find_layers(merged)
        and type(merged.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    )


def test_a_quantised_base_is_not_merged_unasked():
    model, ids = int8_llama(res_mode="bs"), tokens()
    want = logits(model, ids)
    for call in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=r"must hold a plain weight.*dequantize=True"):
            call(model)
    assert torch.equal(logits(model, ids), want)


def test_a_refused_error_leaves_a_quantised_model_as_it_was():
    model, ids = int8_llama(), tokens()
    want = logits(model, ids)
    kinds = [type(x.base_layer.weight) for x in find_layers(model)]
    with pytest.raises(ValueError, match="at most max_error"):
        merge_and_unload(model, "weight", verify=[ids], max_error=1e-9, dequantize=True)
    assert torch.equal(logits(model, ids), want)
    assert [type(x.base_layer.weight) for x in find_layers(model)] == kinds


def test_errors_of_a_quantised_model_are_the_rules_alone():
    model = int8_llama()
    model.train()
    model(tokens())
    report = merge_report(model, [tokens()], "input")
    assert report.rounding_error is None and report.method_error > 0


def test_an_adapter_of_a_quantised_model_is_exported_as_it_is(tmp_path):
    from peft import PeftModel

    model, ids = int8_llama(res_mode="bs"), tokens()
    want = logits(model, ids)
    export_lora(model, tmp_path)
    plain = tiny_llama(3, hidden_size=32, intermediate_size=48)
    state = {k: v for k, v in model.state_dict().items() if "reslora_" not in k}
    dense = {k.replace(".base_layer", ""): _dense(v) for k, v in state.items()}
    plain.load_state_dict(dense)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    assert relative(logits(loaded, ids), want) < 1e-5


def _dense(value):
    return value.dequantize() if hasattr(value, "qdata") else value


class Packed(nn.Module):
    """A layer whose weight nobody knows how to unpack."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.packed = nn.Parameter(base.weight.detach().clone(), requires_grad=False)

    def forward(self, x):
        return x @ self.packed.T


def test_a_base_that_cannot_be_dequantised_is_refused_by_name():
    model = tiny_llama(2)
    for block in model.model.layers:
        block.self_attn.q_proj = Packed(block.self_attn.q_proj)
    model = adapted(model, target_modules=["q_proj"], res_mode="none")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"bitsandbytes; got Packed \(layer model"):
        merge_and_unload(model, dequantize=True)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_merge_is_verified_with_the_weights_that_it_will_write():
    torch.manual_seed(0)
    model = tiny_llama(2, hidden_size=32, intermediate_size=48).to(torch.bfloat16)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    model, ids = adapted(model, 0.2, target_modules=["q_proj"], res_mode="bs"), tokens(4, 9)
    want = logits(model, ids).float()
    with pytest.raises(ValueError, match="at most max_error 1e-06"):
        merge_and_unload(model, verify=[ids], max_error=1e-6, dequantize=True)
    merged = merge_and_unload(model, verify=[ids], max_error=0.1, dequantize=True)
    assert merged.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert 1e-6 < relative(logits(merged, ids).float(), want) < 0.1


def by_bitsandbytes(model, bitsandbytes, kind):
    for block in model.model.layers:
        old = block.self_attn.q_proj
        if kind == "nf4":
            new = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        else:
            new = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        block.self_attn.q_proj = new.to("cpu")
    return model


def quantised(kind):
    """A Llama whose q_proj (of torchao: all linear layers) is quantised, the same each time."""
    torch.manual_seed(3)
    model = tiny_llama(2, hidden_size=64, intermediate_size=64)
    if kind.startswith("bitsandbytes"):
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        return by_bitsandbytes(model, bitsandbytes, kind.split()[1])
    if kind == "torchao int8":
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
        return model
    # The int4 that torchao has for the CPU; its packed forms need a GPU.
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    torchao.quantize_(model, config)
    return model


@pytest.mark.parametrize("res_mode", ["is", "bs"])
@pytest.mark.parametrize(
    "kind", ["torchao int8", "torchao int4", "bitsandbytes nf4", "bitsandbytes int8"]
)
def test_a_quantised_base_is_trained_saved_loaded_and_merged(tmp_path, kind, res_mode):
    config = ResLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], res_mode=res_mode)
    model = inject(quantised(kind), config).train()
    ids = tokens(4, 9)
    losses = fit(model, lambda m: m(input_ids=ids, labels=ids).loss, steps=10, lr=2e-2)
    assert losses[-1] < losses[0]
    model.eval()
    want = logits(model, ids).float()
    save_pretrained(model, tmp_path)
    read = load(quantised(kind), tmp_path).eval()
    assert relative(logits(read, ids).float(), want) < 0.02
    merged = merge_and_unload(model, data=None if res_mode == "bs" else [ids], dequantize=True)
    assert type(merged.model.layers[1].self_attn.q_proj) is nn.Linear
    assert relative(logits(merged, ids).float(), want) < (0.03 if res_mode == "bs" else 0.1)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_layers_are_merged_as_they_compute(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(1)
    model = by_bitsandbytes(tiny_llama(2, hidden_size=64, intermediate_size=64), bitsandbytes, kind)
    model, ids = adapted(model, 0.2, target_modules=["q_proj"], res_mode="bs"), tokens(4, 9)
    model.eval()
    want = logits(model, ids)  # a forward repacks the weights
    merged = merge_and_unload(model, dequantize=True)
    assert type(merged.model.layers[1].self_attn.q_proj) is nn.Linear
    assert relative(logits(merged, ids), want) < 0.02


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_a_merged_model_of_bitsandbytes_is_saved_and_read(tmp_path, kind, targets):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(2, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    is_nf4 = kind == "nf4"
    options = BitsAndBytesConfig(
        load_in_4bit=is_nf4, load_in_8bit=not is_nf4, bnb_4bit_quant_type="nf4"
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=options, device_map="cpu"
    )
    model, ids = adapted(base, 0.2, target_modules=targets, res_mode="bs").eval(), tokens(2, 9)
    merged = merge_and_unload(model, dequantize=True)
    want = logits(merged, ids).float()
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    assert type(read.model.layers[1].self_attn.q_proj) is nn.Linear
    assert relative(logits(read, ids).float(), want) < 0.02
