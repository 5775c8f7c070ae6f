"""layers_to_transform: the plug-in and the core mean the same layers, and exchange folders."""

import copy

import pytest
import torch
from models import Net, Towers, adapted, tiny_llama, tokens

import reslora
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft_models import wrapped  # noqa: E402

LINEAR = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj",
          "self_attn.q_proj", "self_attn.v_proj"]  # fmt: skip
# The model, the options, the layers that they mean.
CONFIGS = {
    "head": (tiny_llama, {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 2]},
             ["lm_head", *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 2))]),
    "path": (tiny_llama, {"target_modules": ["q_proj", "model.layers.0.self_attn.v_proj"],
                          "layers_to_transform": 1},
             ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"]),
    "all": (tiny_llama, {"target_modules": "all-linear", "layers_to_transform": [1]},
            [f"model.layers.1.{name}" for name in LINEAR]),
    "many": (lambda: tiny_llama(4), {"target_modules": "all-linear", "layers_to_transform": [1, 2]},
             [f"model.layers.{n}.{name}" for n in (1, 2) for name in LINEAR]),
    "top": (Net, {"target_modules": ["lin"], "layers_to_transform": [1, 3]},
            ["layers.1.lin", "layers.3.lin"]),
    "first": (Towers, {"target_modules": ["lin"], "layers_to_transform": [1]},
              [f"towers.1.layers.{n}.lin" for n in range(3)]),
    "pattern": (Towers, {"target_modules": ["lin"], "layers_to_transform": [1],
                         "layers_pattern": "layers"},
                [f"towers.{n}.layers.1.lin" for n in range(2)]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize("is_wrapped", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_mean_the_same_layers_and_read_each_others_folders(tmp_path, name, is_wrapped):
    make, options, wanted = CONFIGS[name]
    torch.manual_seed(0)
    base = make().eval()
    make_adapted = wrapped if is_wrapped else adapted
    model = make_adapted(copy.deepcopy(base), **{"res_mode": "bs", **options}).eval()
    assert sorted(layer.name for layer in find_layers(model)) == wanted
    x = tokens() if hasattr(base, "config") else torch.randn(3, 6)
    expected = output(model, x)
    if is_wrapped:
        model.save_pretrained(tmp_path)
    else:
        reslora.save_pretrained(model, tmp_path)
    for read in (reslora.load, peft.PeftModel.from_pretrained):
        loaded = read(copy.deepcopy(base), tmp_path)
        assert sorted(layer.name for layer in find_layers(loaded)) == wanted
        torch.testing.assert_close(output(loaded, x), expected, rtol=0, atol=0)


def output(model, x):
    with torch.no_grad():
        y = model(x)
    return getattr(y, "logits", y)
