"""Folders for the tests of the command reslora, and a run of it in this process."""

import json

import safetensors.torch
import torch
from models import adapted, tiny_llama, tokens

from reslora import calibrate, merge_and_unload, save_pretrained
from reslora.commands.cli import main

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make(folder, model=None, statistics=True, fits=False, **options):
    """Write `base` and `adapter` into a folder; return the adapted model."""
    model = tiny_llama(initializer_range=0.2) if model is None else model
    model.save_pretrained(folder / "base")
    adapted(model, 0.2, **{"target_modules": ["q_proj", "v_proj"], "res_mode": "is"} | options)
    batches = [{"input_ids": tokens(8, 8)} for _ in range(2)]
    model.train()(**batches[0])
    model.eval()
    if fits:
        calibrate(model, batches)
    save_pretrained(model, folder / "adapter", statistics=statistics)
    return model


def run(capsys, *arguments):
    """Run in this process; return exit code, stdout and stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def merge_in(capsys, folder, *options, out="out"):
    return run(capsys, "merge", folder / "base", folder / "adapter", folder / out, *options)


def assert_merged(folder, model, rule=None):
    got = safetensors.torch.load_file(folder / "model.safetensors")
    want = merge_and_unload(model, rule).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def write_tokenizer(folder):
    """Write a tokenizer of single letters; a is 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: n + 3 for n, c in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def lora_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return safetensors.torch.load_file(folder / "adapter_model.safetensors"), config
