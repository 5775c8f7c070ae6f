"""Export for diffusers, and the rules by which a PEFT folder converts to GGUF."""

import copy
import json

import pytest
import safetensors.torch
import torch
from models import adapted, tiny_gpt2, tiny_llama, tokens

from reslora import calibrate, export_diffusers, export_lora, merge
from reslora.injection.adapted import find_layers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 3, 8, 8, generator=generator),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
    }


@torch.no_grad()
def run(model):
    return model(**inputs()).sample


def relative(got, want):
    return ((got - want).square().sum().sqrt() / want.square().sum().sqrt()).item()


@pytest.mark.parametrize(
    ("res_mode", "pre_num", "rule"),
    [("none", 1, None), ("bs", 2, None), ("is", 1, "weight"), ("ms", 1, "lsq")],
)
def test_diffusers_reads_the_export_and_computes_the_same(tmp_path, res_mode, pre_num, rule):
    base = unet()
    model = adapted(
        copy.deepcopy(base), 0.2, target_modules=TARGETS, res_mode=res_mode, pre_num=pre_num
    )
    if rule == "lsq":
        calibrate(model, [inputs()])
    export_diffusers(model, tmp_path, "unet", rule)
    merge(model, rule)
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(
        str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix="unet"
    )
    want = run(model)
    assert relative(run(loaded), want) < 1e-5 < relative(run(base), want)
    keys = set(safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    names = {f"unet.{layer.name}.lora_{x}.weight" for layer in find_layers(model) for x in "AB"}
    assert keys == names


def test_a_pipelines_loader_splits_the_keys_by_component(tmp_path):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    model = adapted(unet(), 0.2, target_modules=TARGETS, res_mode="bs")
    export_diffusers(model, tmp_path, "unet")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path))[:2]
    assert state and all(key.startswith("unet.") for key in state)
    assert not alphas  # without alphas the scale is 1 for every rank


def test_what_such_files_cannot_hold_is_refused(tmp_path):
    model = adapted(unet(), target_modules=TARGETS, modules_to_save=["conv_in"], res_mode="bs")
    with pytest.raises(ValueError, match="such files hold LoRA alone"):
        export_diffusers(model, tmp_path, "unet")
    with pytest.raises(ValueError, match="component must be a pipeline's name"):
        export_diffusers(adapted(unet(), target_modules=TARGETS), tmp_path, "my unet")
    assert not any(tmp_path.iterdir())


def test_the_bias_of_an_affine_fit_is_refused(tmp_path):
    model = adapted(unet(), 0.2, target_modules=["to_out.0"], res_mode="is")
    calibrate(model, [inputs()], affine=True)
    merge(model)
    with pytest.raises(ValueError, match="holds no bias; got that of an affine fit"):
        export_diffusers(model, tmp_path, "unet")
    with pytest.raises(ValueError, match="holds no bias; got that of an affine fit"):
        export_lora(model, tmp_path)
    assert not any(tmp_path.iterdir())


# ---- GGUF


def gguf_pairs(folder):
    """Read a PEFT folder as llama.cpp's convert_lora_to_gguf.py does: alpha from the config alone.

    Every tensor must be a lora_A or lora_B; the scale of a layer is alpha over the rank of its own
    tensors (alpha 0 means 1); patterns and rslora are not looked at.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    alpha = float(config["lora_alpha"])
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        assert name.endswith((".lora_A.weight", ".lora_B.weight")), f"unexpected tensor {key}"
        stem, which = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
        pairs.setdefault(stem, {})[which] = tensor
    scaled = {}
    for stem, pair in pairs.items():
        rank = pair["lora_A"].shape[0]
        scale = alpha / rank if alpha else 1.0
        scaled[stem] = scale * pair["lora_B"] @ pair["lora_A"]
    return config, scaled


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("res_mode", "rule"), [("bs", None), ("is", "weight"), ("none", None)])
def test_a_peft_folder_means_the_same_by_the_rules_of_gguf(tmp_path, make, res_mode, rule):
    targets = ["q_proj", "down_proj"] if make is tiny_llama else ["c_attn"]
    options = {
        "target_modules": targets,
        "rank_pattern": {targets[0]: 3},
        "alpha_pattern": {targets[0]: 7},
        "use_rslora": True,
    }
    base = make()
    model = adapted(copy.deepcopy(base), 0.3, res_mode=res_mode, **options)
    export_lora(model, tmp_path, rule, base_model_name_or_path="some/base")
    merge(model, rule)
    config, deltas = gguf_pairs(tmp_path)
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert config["base_model_name_or_path"] == "some/base"
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = base.get_submodule(name).weight
            weight += delta.T if make is tiny_gpt2 else delta
    ids = tokens()
    with torch.no_grad():
        assert relative(base(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("rank", [6, 2])
def test_a_stacked_block_adapter_is_reduced_to_the_rank_that_it_has(tmp_path, rank):
    model = adapted(tiny_llama(4), 0.3, target_modules=["q_proj"], res_mode="bs", pre_num=3)
    with torch.no_grad():
        for layer in find_layers(model)[1:]:  # all A share two rows
            layer.reslora_A.copy_(find_layers(model)[0].reslora_A * (1 + layer.position))
    error = export_lora(model, tmp_path, rank=rank)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    assert error < 1e-6
    full = tmp_path / "full"
    assert export_lora(model, full) == 0.0
    _, small = gguf_pairs(tmp_path)
    for name, delta in gguf_pairs(full)[1].items():
        assert relative(small[name], delta) < 1e-6


def test_a_rank_that_is_too_small_reports_what_is_lost(tmp_path, caplog):
    model = adapted(tiny_llama(4), 0.3, target_modules=["q_proj"], res_mode="bs", pre_num=3)
    error = export_lora(model, tmp_path / "small", rank=2)
    export_lora(model, tmp_path / "full")
    worst = 0.0
    _, small = gguf_pairs(tmp_path / "small")
    for name, delta in gguf_pairs(tmp_path / "full")[1].items():
        values = torch.linalg.svdvals(delta.double())
        best = (values[2:].square().sum() / values.square().sum()).sqrt().item()
        assert relative(small[name], delta) == pytest.approx(best, rel=1e-3, abs=1e-6)
        worst = max(worst, best)
    assert error == pytest.approx(worst, rel=1e-4)
    assert "rank 2 is too small" in caplog.text
