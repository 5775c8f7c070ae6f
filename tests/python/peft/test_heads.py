"""modules_to_save by PEFT's rule: a name means every module whose path ends with it."""

import copy
import json

import pytest
import torch
from models import randomize, tiny_llama

import reslora

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft import PeftModel  # noqa: E402
from peft_models import logits, options, wrapped  # noqa: E402

from reslora.files.model_folder import merge_folder  # noqa: E402
from reslora.injection.adapted import find_layers, injection_of  # noqa: E402

HEADS = {
    "head": ["lm_head"],
    "lm_head": ["lm_head"],
    "layernorm": [
        f"model.layers.{n}.{own}" for n in range(3) for own in ("input_layernorm",
                                                                "post_attention_layernorm")
    ],
    "norm": [
        *(f"model.layers.{n}.input_layernorm" for n in range(3)),
        *(f"model.layers.{n}.post_attention_layernorm" for n in range(3)),
        "model.norm",
    ],
    "model.norm": ["model.norm"],
}  # fmt: skip


def trained_heads(model):
    names = [n for n, p in model.named_parameters() if p.requires_grad and "reslora" not in n]
    ends = (".weight", ".modules_to_save.default")
    for end in ends:
        names = [name.removesuffix(end) for name in names]
    return sorted(name.removeprefix("base_model.model.") for name in names)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_named_by_its_end_is_trained_saved_and_loaded(base, ids, tmp_path, name):
    own = options(modules_to_save=[name], res_mode="bs")
    model = wrapped(copy.deepcopy(base), **own)
    core = randomize(reslora.inject(copy.deepcopy(base), reslora.ResLoraConfig(**own)), 0.2)
    assert trained_heads(model) == trained_heads(core) == sorted(HEADS[name])
    model.save_pretrained(tmp_path / "peft")
    reslora.save_pretrained(core, tmp_path / "core")
    for folder, source in (("peft", model), ("core", core)):
        wanted = logits(source, ids)
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["modules_to_save"] == [name]
        read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        torch.testing.assert_close(logits(read, ids), wanted, rtol=0, atol=0)
        read.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
        torch.testing.assert_close(logits(again, ids), wanted, rtol=0, atol=0)
        loaded = reslora.load(copy.deepcopy(base), tmp_path / "again")
        torch.testing.assert_close(logits(loaded, ids), wanted, rtol=0, atol=0)
        base.save_pretrained(tmp_path / "base")
        merge_folder(tmp_path / "base", tmp_path / folder, tmp_path / f"{folder}-merged")
        plain = type(base).from_pretrained(tmp_path / f"{folder}-merged")
        torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_a_head_of_several_layers_is_put_back(merge):
    model = torch.nn.Sequential()
    model.body = torch.nn.Linear(4, 4)
    model.head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    own = options(target_modules=["body"], modules_to_save=["head"], res_mode="none")
    adapted = randomize(wrapped(model, **own), 0.3)
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = adapted(x) if merge else adapted.base_model.model.head(model.body.base_layer(x))
        plain = adapted.merge_and_unload() if merge else adapted.unload()
        torch.testing.assert_close(plain(x), wanted)
    assert type(plain.head) is torch.nn.Sequential and type(plain.body) is torch.nn.Linear


def test_targets_in_modules_to_save_are_trained_whole_in_both(base):
    own = options(target_modules=["q_proj", "lm_head"], modules_to_save=["head"], res_mode="none")
    model = wrapped(copy.deepcopy(base), **own)
    core = reslora.inject(copy.deepcopy(base), reslora.ResLoraConfig(**own))
    for adapted in (model, core):
        assert {layer.name.rsplit(".", 1)[-1] for layer in find_layers(adapted)} == {"q_proj"}
        assert trained_heads(adapted) == ["lm_head"]


def test_a_folder_says_itself_which_modules_it_holds(base, ids, tmp_path):
    """Before, a name meant whole parts of a path: `norm` was one module."""
    own = options(modules_to_save=["model.norm"], res_mode="bs")
    core = randomize(reslora.inject(copy.deepcopy(base), reslora.ResLoraConfig(**own)), 0.2)
    injection_of(core, "test").config.modules_to_save = ["norm"]
    reslora.save_pretrained(core, tmp_path)
    read = reslora.load(copy.deepcopy(base), tmp_path)
    assert trained_heads(read) == ["model.norm"]
    torch.testing.assert_close(logits(read, ids), logits(core, ids), rtol=0, atol=0)


def test_what_the_model_lacks_is_refused():
    config = reslora.ResLoraConfig(target_modules=["q_proj"], modules_to_save=["nead"])
    with pytest.raises(ValueError, match="modules_to_save must match modules; got 'nead'"):
        reslora.inject(tiny_llama(), config)
