"""ResLoRA as a method of PEFT: what PEFT's own tests demand of LoRA, and that nothing differs from
an injected model. Files and merging are in test_peft_files.py."""

import copy

import pytest
import torch
from models import LINKED, SHORTCUTS, fit, randomize, tiny_llama
from torch import nn

import reslora
from reslora.files.model_folder import merge_folder
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft import get_peft_model  # noqa: E402
from peft_models import as_file_names, logits, options, wrapped  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from reslora.peft import ResLoraConfig  # noqa: E402

# ---- The same as an injected model ------------------------------------------------------------


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_outputs_and_gradients_are_those_of_an_injected_model(base, ids, res_mode, pre_num):
    changes = {"res_mode": res_mode, "pre_num": pre_num, "lora_dropout": 0.0}
    model = wrapped(copy.deepcopy(base), **changes).train()
    other = reslora.inject(copy.deepcopy(base), reslora.ResLoraConfig(**options(**changes))).train()
    own, theirs = as_file_names(model), as_file_names(other)
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for loss in losses:
        loss.backward()
    for name, parameter in theirs.items():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=0, msg=name)
    assert reslora.print_links(model) == reslora.print_links(other)


def test_step_zero_is_the_base_model(base, ids):
    wanted = logits(base, ids)
    model = get_peft_model(copy.deepcopy(base), ResLoraConfig(**options()))
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)


def test_only_the_adapters_train_and_training_lowers_the_loss(ids):
    model = get_peft_model(tiny_llama(), ResLoraConfig(**options(res_mode="is"))).train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    ends = (".reslora_A.default.weight", ".reslora_B.default.weight")
    assert all(name.endswith(ends) for name in trained)
    losses = fit(model, lambda m: m(input_ids=ids, labels=ids).loss, steps=8)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 1)])
def test_gradients_are_the_same_with_checkpointing(base, ids, res_mode, pre_num):
    grads = []
    for checkpointed in (False, True):
        model = wrapped(copy.deepcopy(base), res_mode=res_mode, pre_num=pre_num).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)


def test_low_precision_bases_get_fp32_adapters(ids):
    model = get_peft_model(tiny_llama().bfloat16(), ResLoraConfig(**options()))
    assert {p.dtype for p in as_file_names(model).values()} == {torch.float32}
    assert logits(model, ids).dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="autocast_adapter_dtype=False changes nothing"):
        other = get_peft_model(
            tiny_llama().bfloat16(), ResLoraConfig(**options()), autocast_adapter_dtype=False
        )
    assert {p.dtype for p in as_file_names(other).values()} == {torch.float32}


# ---- Several adapters, none -------------------------------------------------------------------


def test_disable_adapter_is_the_base_model(base, ids):
    model = wrapped(copy.deepcopy(base), res_mode="bs")
    own, wanted = logits(model, ids), logits(base, ids)
    assert not torch.allclose(own, wanted)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, ids), own, rtol=0, atol=0)
    with reslora.disable_adapter(model):
        torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, ids), own, rtol=0, atol=0)


@pytest.mark.parametrize("head", ["lm_head", "embed_tokens"])
def test_trained_copies_of_tied_tensors_are_refused_elsewhere(tmp_path, head):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    config = ResLoraConfig(target_modules=["q_proj"], modules_to_save=[head], res_mode="none")
    with pytest.raises(ValueError, match="must hold parameters of their own; got"):
        reslora.inject(base, config)
    model = get_peft_model(base, config)  # trains a copy
    model.save_pretrained(tmp_path / "adapter")
    tied = {
        "lm_head": r"lm_head\.weight, tied to model\.embed_tokens\.weight",
        "embed_tokens": r"embed_tokens\.weight, tied to the output head \(tie_word_embeddings\)",
    }
    with pytest.raises(ValueError, match=tied[head]):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="must hold parameters of their own; got"):
        reslora.load(tiny_llama(tie_word_embeddings=True), tmp_path / "adapter")


def test_resized_embeddings_need_a_resized_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3)
    get_peft_model(base, ResLoraConfig(**options())).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"43 in the file \(model\.resize_token_embeddings\(43\)"):
        reslora.load(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="the base must be resized as for the training"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "weight")


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_second_adapter_finds_its_targets(targets):
    model = get_peft_model(tiny_llama(), ResLoraConfig(target_modules=targets))
    first = {layer.name for layer in find_layers(model)}
    model.add_adapter("second", ResLoraConfig(target_modules=targets))
    model.set_adapter("second")
    assert {layer.name for layer in find_layers(model)} == first
    assert not any("base_layer" in name for name in first)


def test_merging_twice_warns(ids):
    model = wrapped(res_mode="bs")
    model.merge_adapter()
    want = logits(model, ids)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), want, rtol=0, atol=0)


def test_layers_that_are_not_called_are_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2)
    with pytest.raises(ValueError, match="in MultiheadAttention, which does not call it"):
        get_peft_model(model, ResLoraConfig(target_modules=["out_proj"]))


def test_named_adapters_with_one_active(base, ids):
    model = wrapped(copy.deepcopy(base), res_mode="is")
    first = logits(model, ids)
    second = ResLoraConfig(**options(res_mode="bs", r=2, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("second", second)
    torch.testing.assert_close(logits(model, ids), first, rtol=0, atol=0)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, ids), logits(base, ids), rtol=0, atol=0)
    randomize(model, 0.2)  # what trains: the second one
    other = logits(model, ids)
    assert not torch.allclose(other, first)
    assert {layer.adapter_name for layer in find_layers(model)} == {"second"}
    assert "up_proj" in reslora.print_links(model)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, ids), first, rtol=0, atol=0)
    assert "up_proj" not in reslora.print_links(model)
    with pytest.raises(ValueError, match="one adapter can be active at a time"):
        model.base_model.set_adapter(["default", "second"])
    model.set_adapter("second")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.set_adapter("default")  # unmerges, as PEFT does
    torch.testing.assert_close(logits(model, ids), first, rtol=0, atol=0)
    model.delete_adapter("default")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, ids), other, rtol=0, atol=0)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), other, rtol=1e-4, atol=1e-5)


def test_a_second_adapter_is_loaded_beside_the_first(base, ids, tmp_path):
    other = wrapped(copy.deepcopy(base), res_mode="bs", r=3)
    other.save_pretrained(tmp_path)
    model = wrapped(copy.deepcopy(base), res_mode="is")
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    torch.testing.assert_close(logits(model, ids), logits(other, ids), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both/loaded/adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="the active adapter is merged"):
        model.merge_and_unload(adapter_names=["default"])


def test_status_and_counts(base, capsys):
    model = wrapped(copy.deepcopy(base))
    status = model.get_layer_status()
    assert len(status) == 9
    assert all(s.enabled and s.requires_grad == {"default": True} for s in status)
    assert model.get_model_status().num_adapter_layers == 9
    model.print_trainable_parameters()
    own = capsys.readouterr().out
    reslora.print_trainable_parameters(model)
    assert capsys.readouterr().out == own
    assert len(model.targeted_module_names) == 9


# ---- transformers, injected, copies -----------------------------------------------------------


def test_add_adapter_of_transformers(base, ids, tmp_path):
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    model.add_adapter(ResLoraConfig(**options(res_mode="bs")))
    randomize(model, 0.2)
    wanted = logits(model, ids)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, ids), logits(base, ids), rtol=0, atol=0)
    model.enable_adapters()
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    read = copy.deepcopy(base)
    read.load_adapter(tmp_path)
    torch.testing.assert_close(logits(read, ids), wanted, rtol=0, atol=0)
    assert "self_attn.q_proj" in reslora.print_links(read)
    plain = reslora.merge_and_unload(model)
    torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-5)


def test_inject_adapter_in_model(base, ids):
    model = peft.inject_adapter_in_model(ResLoraConfig(**options()), copy.deepcopy(base))
    assert len(find_layers(model)) == 9
    tensors = peft.get_peft_model_state_dict(model)
    assert len(tensors) == 18
    other = peft.inject_adapter_in_model(ResLoraConfig(**options()), copy.deepcopy(base))
    peft.set_peft_model_state_dict(other, {k: v + 0.1 for k, v in tensors.items()})
    for name, value in peft.get_peft_model_state_dict(other).items():
        torch.testing.assert_close(value, tensors[name] + 0.1)


def test_copies_are_independent(base, ids):
    model = wrapped(copy.deepcopy(base))
    logits(model, ids)
    twin = copy.deepcopy(model)
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(twin, ids), wanted, rtol=0, atol=0)
    randomize(twin, 0.3)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=0)
    assert not torch.allclose(logits(twin, ids), wanted)


def test_the_state_dict_has_each_tensor_once(base):
    model = wrapped(copy.deepcopy(base))
    keys = list(model.state_dict())
    assert len([k for k in keys if "reslora" in k]) == 18
    assert len([k for k in keys if k.endswith("q_proj.base_layer.weight")]) == 3


@pytest.mark.parametrize("res_mode", ["is", "bs", "ms"])
def test_compiled(base, ids, res_mode):
    model = wrapped(copy.deepcopy(base), res_mode=res_mode).train()
    wanted = model(input_ids=ids, labels=ids).loss
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, wanted)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


# ---- Bad input --------------------------------------------------------------------------------


class Convolved(nn.Module):
    """A linear layer, then a layer that cannot be adapted."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.lin(x).T).T


def test_a_failed_injection_leaves_the_model_as_it_was():
    model = Convolved()
    with pytest.raises(ValueError, match=r"targets must be linear layers; got Conv1d at conv"):
        get_peft_model(model, ResLoraConfig(target_modules=["lin", "conv"]))
    assert type(model.lin) is nn.Linear
    wrapped_model = get_peft_model(model, ResLoraConfig(target_modules=["lin"], res_mode="none"))
    with pytest.raises(ValueError, match="targets must be linear layers"):
        wrapped_model.add_adapter("b", ResLoraConfig(target_modules=["lin", "conv"]))
    assert list(model.lin.reslora_A) == ["default"]
    assert model(torch.randn(3, 4)).shape == (3, 4)


def test_other_adapters_on_the_model_are_refused(base):
    model = get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must hold no other adapters; got Linear"):
        get_peft_model(model.base_model.model, ResLoraConfig(**options()))
    injected = reslora.inject(copy.deepcopy(base), reslora.ResLoraConfig(**options()))
    with pytest.raises(ValueError, match="must hold no other adapters; got ResLoraLinear"):
        get_peft_model(injected, ResLoraConfig(**options()))
    with pytest.raises(ValueError, match="must be plain"):
        reslora.inject(wrapped(copy.deepcopy(base)), reslora.ResLoraConfig(**options()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 0}, "r must be"),
        ({"res_mode": "input"}, "res_mode"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"task_type": "NLG"}, "task type"),
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_bad_options_are_refused_by_name(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        ResLoraConfig(**options(**changes))


def test_mixed_batches_are_refused(base, ids):
    model = wrapped(copy.deepcopy(base))
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=ids, adapter_names=["default", "__base__"])
