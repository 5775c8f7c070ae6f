"""Merging on disk from C++ programs (`merge_files`) and by `merge_folder`: the same tensors."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from models import adapted, tiny_bert, tiny_gpt2, tiny_llama, tokens

from reslora import _C, calibrate, save_pretrained
from reslora.files.model_folder import merge_folder


def prepare(folder, model, affine=False, max_shard_size="1GB", **options):
    """Write `base`, and `adapter` with statistics."""
    model.save_pretrained(folder / "base", max_shard_size=max_shard_size)
    adapted(model, 0.2, **options).train()
    for _ in range(2):
        model(input_ids=tokens(8, 8))
    model.eval()
    calibrate(model, [{"input_ids": tokens(8, 8)}] * 2, affine=affine)
    save_pretrained(model, folder / "adapter", statistics=True)


def with_biases():
    model = tiny_bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.bias.normal_()
    return model


CASES = {
    "biases and a head": lambda folder: prepare(
        folder, with_biases(), affine=True,
        target_modules=["intermediate.dense"], modules_to_save=["classifier"],
    ),
    "transposed weights": lambda folder: prepare(
        folder, tiny_gpt2(), target_modules=["c_attn", "attn.c_proj", "mlp.c_proj"], res_mode="is"
    ),
    "shards": lambda folder: prepare(
        folder, tiny_llama(), max_shard_size="10KB", target_modules="all-linear", res_mode="ms"
    ),
    "half precision": lambda folder: prepare(
        folder, tiny_llama().bfloat16(), target_modules=r".*\.(q_proj|v_proj)", res_mode="bs"
    ),
}  # fmt: skip


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


def merge_both(folder, merge_method=None):
    merge_folder(folder / "base", folder / "adapter", folder / "python", merge_method)
    base = [os.fspath(path) for path in files_of(folder / "base")]
    return _C.merge_files(base, folder / "adapter", folder / "cpp", merge_method or "")


@pytest.mark.parametrize("merge_method", [None, "weight", "input"])
@pytest.mark.parametrize("case", CASES)
def test_both_languages_write_the_same_tensors(tmp_path, case, merge_method):
    CASES[case](tmp_path)
    layers = merge_both(tmp_path, merge_method)
    assert len(layers) >= 2
    pairs = list(zip(files_of(tmp_path / "cpp"), files_of(tmp_path / "python"), strict=True))
    assert len(pairs) == (4 if case == "shards" else 1)
    changed = 0
    for own, other in pairs:
        assert own.name == other.name
        got, want = (safetensors.torch.load_file(path) for path in (own, other))
        before = safetensors.torch.load_file(tmp_path / "base" / own.name)
        assert got.keys() == want.keys() == before.keys()
        for key, tensor in got.items():
            assert tensor.dtype == want[key].dtype
            assert torch.equal(tensor, want[key]), key
            changed += not torch.equal(tensor, before[key])
    assert changed >= len(layers)


def refusal(call):
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def assert_both_refuse(folder, part):
    base = [os.fspath(path) for path in files_of(folder / "base")]
    own = refusal(lambda: _C.merge_files(base, folder / "adapter", folder / "cpp"))
    other = refusal(lambda: merge_folder(folder / "base", folder / "adapter", folder / "python"))
    assert own == other and part in own
    assert not (folder / "cpp").exists() and not (folder / "python").exists()


def test_both_languages_refuse_another_base_in_the_same_words(tmp_path):
    prepare(tmp_path, tiny_llama(2), target_modules=["q_proj", "v_proj"], res_mode="none")
    for other, part in (
        (tiny_llama(3), "got 3 layers model.layers.*.self_attn.q_proj, of which the adapter has 2"),
        (tiny_llama(1), "got none for model.layers.1.self_attn.q_proj among"),
        (tiny_llama(2, hidden_size=24), "the base must fit the adapter; got [24, 24] for model"),
        (tiny_llama(2).to(torch.float8_e4m3fn), "merge into the original, unquantised files"),
    ):
        other.save_pretrained(tmp_path / "base")
        assert_both_refuse(tmp_path, part)


def test_both_languages_refuse_a_head_that_the_config_ties(tmp_path):
    prepare(tmp_path, tiny_bert(), target_modules=["query"], modules_to_save=["word_embeddings"])
    config = tmp_path / "base" / "config.json"

    def tie(is_tied):
        values = json.loads(config.read_text()) | {"tie_word_embeddings": is_tied}
        config.write_text(json.dumps(values))

    tie(True)
    assert_both_refuse(tmp_path, "bert.embeddings.word_embeddings.weight, tied to the output head")
    tie(False)
    assert len(merge_both(tmp_path)) == 3


def test_a_write_that_fails_leaves_none_of_the_files(tmp_path):
    CASES["shards"](tmp_path)
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / files_of(tmp_path / "base")[-1].name).mkdir()
    base = [os.fspath(path) for path in files_of(tmp_path / "base")]
    with pytest.raises(ValueError, match="an output must be a new file"):
        _C.merge_files(base, tmp_path / "adapter", tmp_path / "cpp")
    assert len(list((tmp_path / "cpp").iterdir())) == 1
