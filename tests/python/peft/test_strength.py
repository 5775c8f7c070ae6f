"""How strong an adapter is while a model runs: PEFT's set_scale, diffusers' weights and scale;
and LoRA+'s rates of A and B."""

import copy

import pytest
import torch
from models import SHORTCUTS, randomize, tiny_llama, tokens

import reslora
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from peft_models import as_file_names, logits, options, wrapped  # noqa: E402

from reslora.peft import PeftLinear, ResLoraConfig  # noqa: E402

EXACT = {"rtol": 0, "atol": 0}


def peft_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PeftLinear)}


def twins(base, ids, weak, **changes):
    """A model, and one with the same A, B and norms whose config says what `weak` changes."""
    models = [
        wrapped(copy.deepcopy(base), **changes),
        wrapped(copy.deepcopy(base), **changes | weak),
    ]
    with torch.no_grad():
        for own, other in zip(*(as_file_names(m).values() for m in models), strict=True):
            other.copy_(own)
    return models


def run_once(models, ids):
    """Let training forwards record norms, the same in both: of the weak model."""
    models[1].train()(ids)
    models[1].eval()
    for own, other in zip(*map(find_layers, models), strict=True):
        own.norms, own.norm_count, own.products = other.norms, other.norm_count, other.products


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_the_strength_of_all_layers_is_another_lora_alpha(base, ids, res_mode, pre_num):
    changes = {"res_mode": res_mode, "pre_num": pre_num}
    model, weak = twins(base, ids, {"lora_alpha": 3}, **changes)  # 6 by default
    full, wanted = logits(model, ids), logits(weak, ids)
    assert not torch.allclose(full, wanted, rtol=1e-3)
    for layer in peft_layers(model).values():
        layer.set_scale("default", 0.5)
        layer.set_scale("another", 7)  # no such adapter
    torch.testing.assert_close(logits(model, ids), wanted, **EXACT)
    losses = [m.train()(input_ids=ids, labels=ids).loss for m in (model, weak)]
    for loss in losses:
        loss.backward()
    for own, other in zip(*(as_file_names(m).values() for m in (model, weak)), strict=True):
        torch.testing.assert_close(own.grad, other.grad, **EXACT)
    model.eval()
    for layer in peft_layers(model).values():
        layer.unscale_layer()
    torch.testing.assert_close(logits(model, ids), full, **EXACT)
    for layer in peft_layers(model).values():
        layer.scale_layer(0.25)
        layer.scale_layer(4)
        layer.scale_layer(0.5)
    torch.testing.assert_close(logits(model, ids), wanted, **EXACT)
    for layer in peft_layers(model).values():
        layer.unscale_layer(0.5)
    torch.testing.assert_close(logits(model, ids), full, **EXACT)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_the_strength_of_a_layer_is_its_alpha(base, ids, res_mode, pre_num):
    name = "model.layers.1.self_attn.v_proj"
    changes = {"res_mode": res_mode, "pre_num": pre_num}
    model, weak = twins(base, ids, {"alpha_pattern": {name: 12}}, **changes)
    peft_layers(model)[f"base_model.model.{name}"].scale_layer(2)
    torch.testing.assert_close(logits(model, ids), logits(weak, ids), **EXACT)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("how", ["merge_adapter", "lsq", "weight", "export"])
def test_merging_takes_the_strength_along(base, ids, tmp_path, res_mode, pre_num, how):
    models = twins(base, ids, {"lora_alpha": 3}, res_mode=res_mode, pre_num=pre_num)
    run_once(models, ids)
    for layer in peft_layers(models[0]).values():
        layer.set_scale("default", 0.5)
    found = []
    for n, model in enumerate(models):
        if how == "merge_adapter":
            model.merge_adapter()
        elif how == "export":
            reslora.export_lora(model, tmp_path / str(n), "weight")
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(n))
        else:
            torch.manual_seed(4)
            data = [{"input_ids": tokens(4, 9)}] if how == "lsq" else None
            reslora.merge(model, how, data=data)
        found.append(logits(model, ids))
    torch.testing.assert_close(found[0], found[1], **EXACT)
    assert not torch.allclose(found[0], logits(base, ids), rtol=1e-3)


@pytest.mark.parametrize("res_mode", ["is", "bs", "ms"])
def test_an_adapter_of_no_strength_is_the_base(base, ids, res_mode):
    model = wrapped(copy.deepcopy(base), res_mode=res_mode)
    for layer in peft_layers(model).values():
        layer.set_scale("default", 0)
    torch.testing.assert_close(logits(model, ids), logits(base, ids))
    reslora.merge(model, data=[{"input_ids": tokens(4, 9)}])
    torch.testing.assert_close(logits(model, ids), logits(base, ids))


def test_the_strength_of_a_merged_adapter_is_refused(base, ids):
    model = wrapped(copy.deepcopy(base), res_mode="bs")
    model.merge_adapter()
    merged = logits(model, ids)
    layer = next(iter(peft_layers(model).values()))
    for change in (lambda: layer.set_scale("default", 0.5), lambda: layer.scale_layer(2)):
        with pytest.raises(ValueError, match=r"lies in the weights; got .*unmerge_adapter first"):
            change()
    layer.unscale_layer()  # which it is
    torch.testing.assert_close(logits(model, ids), merged, **EXACT)
    model.unmerge_adapter()
    for bad in (float("nan"), "1", None):
        with pytest.raises(ValueError, match="a strength must be a finite number"):
            layer.set_scale("default", bad)


def test_files_and_fits_know_the_strength(base, ids, tmp_path):
    model = wrapped(copy.deepcopy(base))
    batches = [{"input_ids": tokens(4, 9)}]
    wanted = logits(model, ids)
    reslora.calibrate(model, batches)
    for layer in peft_layers(model).values():
        layer.set_scale("default", 0.5)
    with pytest.raises(ValueError, match="fits must be of the adapter as it is"):
        reslora.merge(model, "lsq")
    reslora.save_pretrained(model, tmp_path / "own", statistics=True)  # of the full strength
    read = reslora.load(copy.deepcopy(base), tmp_path / "own")
    torch.testing.assert_close(logits(read, ids), wanted, **EXACT)
    reslora.merge(read, "lsq")
    reslora.calibrate(model, batches)
    with pytest.raises(ValueError, match="fits must be of the adapter as it is"):
        reslora.save_pretrained(model, tmp_path / "weak", statistics=True)
    for refused in (reslora.finish, lambda m, d: reslora.refine(m, d, 1)):
        with pytest.raises(ValueError, match=r"must have its full strength; got 0\.5 in model"):
            refused(model, batches * 8)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin, ids), logits(model, ids), **EXACT)


def test_convert_to_lora_takes_the_strength_along(base, ids):
    convert_to_lora = pytest.importorskip("peft", minversion="0.19").convert_to_lora
    model = wrapped(copy.deepcopy(base), res_mode="bs")
    convert_to_lora(model, rank=8)
    for layer in peft_layers(model).values():
        layer.set_scale("default", 0.5)
    config, tensors = convert_to_lora(model, rank=8)
    lora = peft.get_peft_model(copy.deepcopy(base), config).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(logits(lora, ids), logits(model, ids), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_follows_the_strength(base, ids):
    model = wrapped(copy.deepcopy(base), res_mode="is")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for strength in (1, 0.5, 0.25):
        for layer in peft_layers(model).values():
            layer.set_scale("default", strength)
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids))


@pytest.mark.parametrize("weights", [0.5, {"down": 0.5, "mid": 0.5, "up": 0.5}])
def test_weights_and_scale_of_diffusers(weights):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
        layers_per_block=2, transformer_layers_per_block=2,
    ).eval()  # fmt: skip
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    models = []
    for alpha in (8, 4):
        torch.manual_seed(1)
        model = copy.deepcopy(unet)
        model.add_adapter(ResLoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
        models.append(randomize(model, 0.3))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)

    def run(model, **more):
        with torch.no_grad():
            return model(x, 3, text, **more).sample

    full, wanted = map(run, models)
    assert not torch.allclose(full, wanted, rtol=1e-3)
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    torch.testing.assert_close(run(models[0], **half), wanted, **EXACT)
    torch.testing.assert_close(run(models[0]), full, **EXACT)
    models[0].set_adapters("default", weights)
    torch.testing.assert_close(run(models[0]), wanted, **EXACT)
    none = run(models[0], cross_attention_kwargs={"scale": 0})
    torch.testing.assert_close(none, run(unet), rtol=1e-5, atol=1e-5)


# ---- LoRA+ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plug-in", "core"])
def test_loraplus_gives_every_b_its_own_rate(ids, how):
    torch.manual_seed(0)
    if how == "plug-in":
        model = peft.get_peft_model(tiny_llama(), ResLoraConfig(**options()))
    else:
        model = reslora.inject(tiny_llama(), reslora.ResLoraConfig(**options()))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == 18
    model.train()(input_ids=ids, labels=ids).loss.backward()
    randomize(model, 0.2)
    before = {name: p.detach().clone() for name, p in as_file_names(model).items()}
    optimizer.step()
    for name, p in as_file_names(model).items():
        rate = 1.6e-2 if name.endswith(".B") else 1e-3
        assert rates[id(p)] == pytest.approx(rate)
        torch.testing.assert_close(p, before[name] - rate * p.grad)
