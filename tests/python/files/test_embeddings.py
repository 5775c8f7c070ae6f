"""Embeddings of a resized vocabulary go with the adapter: saved, loaded, exported, merged."""

import copy
import warnings

import pytest
import torch
from models import adapted, tiny_bert, tiny_llama
from safetensors.torch import load_file

import reslora
from reslora.commands.cli import main
from reslora.files.model_folder import merge_folder

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft_models import logits, options, wrapped  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

TOKENS = 43  # the base has 40
WORDS = r"was resized, so the embeddings go with the adapter; got 43 tokens, in .*base 40"
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def make(tmp_path, request):
    """Returns a function that loads a base and gives it rows that no file has."""
    torch.manual_seed(0)
    tiny_llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")

    def resized(seed):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(TOKENS, mean_resizing=False)
        return model.eval()

    return resized


@pytest.fixture
def ids():
    return torch.randint(35, TOKENS, (2, 7), generator=torch.Generator().manual_seed(3))


def core(base):
    return adapted(base, 0.2, **options(res_mode="bs"))


def plugin(base):
    return wrapped(base, res_mode="bs")


@pytest.mark.parametrize("adapt", [core, plugin])
def test_they_are_saved_and_loaded(make, ids, tmp_path, adapt):
    model = adapt(make(1))
    wanted = logits(model, ids)
    with pytest.warns(UserWarning, match=WORDS):
        reslora.save_pretrained(model, tmp_path / "own")
    read = reslora.load(make(2), tmp_path / "own")
    torch.testing.assert_close(logits(read, ids), wanted, **EXACT)
    with pytest.warns(UserWarning, match=WORDS):  # the model that was loaded does the same
        reslora.save_pretrained(read, tmp_path / "again")
    by_peft = peft.PeftModel.from_pretrained(make(3), tmp_path / "again")
    torch.testing.assert_close(logits(by_peft, ids), wanted, **EXACT)
    by_peft.save_pretrained(tmp_path / "peft")
    torch.testing.assert_close(
        logits(reslora.load(make(4), tmp_path / "peft"), ids), wanted, **EXACT
    )


def test_they_are_exported_and_taken_over(make, ids, tmp_path):
    model = core(make(1))
    wanted = logits(model, ids)
    with pytest.warns(UserWarning, match=WORDS):
        reslora.export_lora(model, tmp_path / "lora")
    read = peft.PeftModel.from_pretrained(make(2), tmp_path / "lora")
    torch.testing.assert_close(logits(read, ids), wanted, rtol=1e-4, atol=1e-5)
    r = read.peft_config["default"].r
    plain = reslora.ResLoraConfig(**options(res_mode="none", r=r))
    start = reslora.inject(make(3), plain)
    reslora.init_from_lora(start, tmp_path / "lora")
    torch.testing.assert_close(logits(start, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt", [core, plugin])
def test_they_are_merged_into_the_files_of_a_resized_base(make, ids, tmp_path, adapt):
    make(2).save_pretrained(tmp_path / "resized")
    model = adapt(make(1))
    wanted = logits(model, ids)
    if adapt is plugin:
        model.save_pretrained(tmp_path / "adapter")
    else:
        reslora.save_pretrained(model, tmp_path / "adapter")
    merge_folder(tmp_path / "resized", tmp_path / "adapter", tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(read, ids), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the base must be resized as for the training"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
    arguments = [str(tmp_path / name) for name in ("adapter", "lora")]
    assert main(["export-lora", *arguments]) == 0
    read = peft.PeftModel.from_pretrained(make(3), tmp_path / "lora")
    torch.testing.assert_close(logits(read, ids), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_of_another_vocabulary_is_refused(make, tmp_path):
    reslora.save_pretrained(core(make(1)), tmp_path / "own")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(
        ValueError, match=r"got 40 tokens in .*, 43 in the file .model\.resize_token_embeddings.43"
    ):
        reslora.load(base, tmp_path / "own")
    assert before.keys() == base.state_dict().keys()


def test_the_caller_may_decide(make, tmp_path):
    model = core(make(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reslora.save_pretrained(model, tmp_path / "without", save_embedding_layers=False)
        reslora.export_lora(model, tmp_path / "lora", save_embedding_layers=False)
        plain = core(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        reslora.save_pretrained(plain, tmp_path / "plain")
        reslora.save_pretrained(plain, tmp_path / "with", save_embedding_layers=True)
    keys = {
        name: {key for key in load_file(path / "adapter_model.safetensors") if "lora_" not in key}
        for name, path in ((n, tmp_path / n) for n in ("without", "lora", "plain", "with"))
    }
    assert not keys["without"] and not keys["lora"] and not keys["plain"]
    assert keys["with"] == {
        f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")
    }
    with pytest.raises(ValueError, match="save_embedding_layers must be True, False or 'auto'"):
        reslora.save_pretrained(model, tmp_path / "bad", save_embedding_layers="yes")


@pytest.mark.parametrize("make", [False], indirect=True)
@pytest.mark.parametrize("by", ["peft", "reslora"])
def test_they_are_saved_where_the_head_is_adapted_too(make, ids, tmp_path, by):
    model = wrapped(make(1), res_mode="bs", target_modules=["q_proj", "lm_head"])
    wanted = logits(model, ids)
    if by == "peft":
        model.save_pretrained(tmp_path / "adapter")
    else:
        reslora.save_pretrained(model, tmp_path / "adapter")
    for read in (
        reslora.load(make(2), tmp_path / "adapter"),
        peft.PeftModel.from_pretrained(make(2), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits(read, ids), wanted, **EXACT)


def test_a_base_that_is_not_here_is_named(tmp_path):
    model = core(tiny_llama())
    model.config._name_or_path = str(tmp_path / "gone")
    with pytest.warns(UserWarning, match=r"config\.json is not on this machine.*gone"):
        reslora.save_pretrained(model, tmp_path / "own")


def test_what_trains_and_is_not_saved_is_named(tmp_path):
    model = adapted(tiny_bert(), target_modules=["query"], modules_to_save=["classifier"])
    model.bert.pooler.dense.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"got 1 parameters such as bert\.pooler\.dense\.bias"):
        reslora.save_pretrained(model, tmp_path)
