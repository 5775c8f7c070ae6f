"""The command `reslora inspect`: what a file or folder is said to hold."""

import json
import math
import shutil

import pytest
import torch
from cli_samples import make, run
from models import tiny_llama

from reslora import export_lora, save_pretrained


def test_an_adapter_is_inspected(tmp_path, capsys):
    model = make(tmp_path, fits=True, r=2, lora_alpha=3)
    code, out, _ = run(capsys, "inspect", tmp_path / "adapter", "--json")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "ResLoRA adapter" and found["warnings"] == []
    parameters = [p for name, p in model.named_parameters() if "reslora" in name]
    count = sum(p.numel() for p in parameters)
    assert (found["tensors"], found["parameters"]) == (len(parameters), count)
    assert found["bytes"] == 4 * count and found["dtypes"] == {"float32": count}
    assert found["options"]["res_mode"] == "is" and found["options"]["r"] == 2
    chain = next(c for c in found["chains"] if c["name"].endswith("v_proj"))
    assert (chain["layers"], chain["shape"], chain["scaling"]) == (3, "16 -> 8", "1.5")
    norms = [b.self_attn.v_proj.reslora_B.norm().item() for b in model.model.layers]
    assert chain["norm_B"] == f"{min(norms):.3g} to {max(norms):.3g}"
    wanted = "norms of 6 layers, products of 4, fits of 4 (largest residual 0."
    assert found["statistics"].startswith(wanted)
    file = run(capsys, "inspect", tmp_path / "adapter/adapter_model.safetensors", "--json")[1]
    assert json.loads(file) == found
    text = run(capsys, "inspect", tmp_path / "adapter")[1]
    assert text.startswith(f"{tmp_path / 'adapter'}: ResLoRA adapter\n") and "statistics:" in text


def test_an_adapter_that_changes_nothing_is_named(tmp_path, capsys):
    model = make(tmp_path)
    for name, parameter in model.named_parameters():
        if "reslora_B" in name:
            parameter.data.zero_()
    save_pretrained(model, tmp_path / "adapter")
    _, out, _ = run(capsys, "inspect", tmp_path / "adapter")
    assert "warning: every B is zero" in out and "statistics" not in out


def test_models_and_plain_lora_are_inspected(tmp_path, capsys):
    model = make(tmp_path)
    export_lora(model, tmp_path / "lora")
    lora = json.loads(run(capsys, "inspect", tmp_path / "lora", "--json")[1])
    assert lora["kind"] == "plain LoRA (LORA)" and lora["options"]["r"] == 2
    folder = json.loads(run(capsys, "inspect", tmp_path / "base", "--json")[1])
    file = tmp_path / "base" / "model.safetensors"
    single = json.loads(run(capsys, "inspect", file, "--json")[1])
    assert folder | {"path": 0} == single | {"path": 0} and folder["kind"] == "tensors"
    count = sum(p.numel() for p in tiny_llama().parameters())
    assert folder["parameters"] == count and folder["tensors"] == 30
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    _, out, _ = run(capsys, "inspect", tmp_path / "shards")
    files = len(list((tmp_path / "shards").glob("*.safetensors")))
    assert f"tensors in {files} files" in out and f"({count:,} bfloat16)" in out


# ---- JSON


def document(capsys, path):
    """What inspect says of a path, in JSON that every reader takes: without NaN."""
    code, out, err = run(capsys, "inspect", path, "--json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


LOSSES = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}, {"eval_loss": 1.0}]
PARTS = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
JSON_KINDS = [
    (
        {"peft_type": "RESLORA", "res_mode": "ms", "pre_num": 2, "r": 8},
        "config of a ResLoRA adapter",
        {"res_mode": "ms", "pre_num": 2, "r": 8},
    ),
    (
        {"peft_type": "LORA", "r": 4, "target_modules": ["q"], "base_model_name_or_path": None},
        "config of a PEFT adapter (LORA)",
        {"r": 4, "target_modules": ["q"]},
    ),
    (
        {"rank": 4, "res_flag": 3, "pre_num": 999},
        "config of a checkpoint of the authors' program (reslora convert reads its folder)",
        {"rank": 4, "res_flag": 3, "pre_num": 999},
    ),
    (
        {"weight_map": {"a": "1", "b": "2", "c": "2"}, "metadata": {"total_size": 12}},
        "index of a model's files",
        {"tensors": 3, "files": 2, "total_size": 12},
    ),
    ({"weight_map": ["a"], "metadata": 3}, "index of a model's files", {}),
    (
        {"global_step": 2, "epoch": 1.5, "best_metric": None, "log_history": LOSSES},
        "state of a training (reslora plot losses draws it)",
        {"global_step": 2, "epoch": 1.5, "entries": 3, "last_loss": "nan"},
    ),
    (
        {"log_history": "none"},
        "state of a training (reslora plot losses draws it)",
        {},
    ),
    (
        {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "1"} | PARTS,
        "index of a pipeline of diffusers (StableDiffusionPipeline)",
        {"components": ["unet", "vae"]},
    ),
    ({"_class_name": "AutoencoderKL"}, "config of a model of diffusers (AutoencoderKL)", {}),
    (
        {"model_type": "llama", "architectures": ["L"], "hidden_size": 16, "vocab_size": 40},
        "config of a model (llama)",
        {"architectures": ["L"], "hidden_size": 16, "vocab_size": 40},
    ),
    ({"architectures": ["L"]}, "config of a model (of no named type)", {"architectures": ["L"]}),
    ({"a": 1, "b": 2}, "JSON with a, b", {}),
    ({str(n): n for n in range(10)}, "JSON with 0, 1, 2, 3, 4, 5, 6, 7 and 2 more", {}),
    ({}, "JSON, an empty object", {}),
    ([1, 2, 3], "JSON, a list of 3 entries", {}),
    (None, "JSON, a value of null, true, false, a number or a text", {}),
]


@pytest.mark.parametrize(("values", "kind", "options"), JSON_KINDS)
def test_a_json_file_is_said_to_be_what_it_is(tmp_path, capsys, values, kind, options):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(values))
    found = document(capsys, path)
    assert (found["path"], found["kind"], found["options"]) == (str(path), kind, options)
    assert found["tensors"] == found["bytes"] == 0
    lines = run(capsys, "inspect", path)[1].splitlines()
    assert lines[0] == f"{path}: {kind}" and len(lines) == 1 + bool(options)


TOO_DEEP = "must be nested at most 100 deep; got JSON that is deeper"
TOO_LONG = "must hold numbers of at most 4,300 digits; got a longer one"
NO_JSON = [
    (b"", "must be JSON; got Expecting value"),
    (b"{", "must be JSON; got Expecting property name"),
    (b'"\xff', "must be UTF-8; got invalid start byte at 1"),
    (b"[" * 100_000, TOO_DEEP),
    (b"[" * 101 + b"]" * 101, TOO_DEEP),
    (b'{"a":' * 101 + b"1" + b"}" * 101, TOO_DEEP),
    (b'{"r": ' + b"9" * 5000 + b"}", TOO_LONG),
]


@pytest.mark.parametrize(("text", "words"), NO_JSON)
def test_a_file_that_is_no_json_is_one_sentence(tmp_path, capsys, text, words):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    code, out, err = run(capsys, "inspect", path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"reslora: [inspect] {path} {words}")
    code, out, nothing = run(capsys, "inspect", path, "--json")
    assert (code, nothing) == (1, "") and f"reslora: {json.loads(out)['error']}\n" == err


def test_json_is_read_as_deep_as_it_may_be(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[" * 100 + "]" * 100)
    assert document(capsys, tmp_path / "config.json")["kind"] == "JSON, a list of 1 entries"


def test_numbers_that_json_has_not_are_texts_wherever_they_lie(tmp_path, capsys):
    make(tmp_path)
    values = {"peft_type": "LORA", "lora_alpha": math.inf, "target_modules": [{"q": math.nan}]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(values))
    expected = {"lora_alpha": "inf", "target_modules": [{"q": "nan"}]}
    assert document(capsys, tmp_path / "adapter")["options"] == expected
    assert document(capsys, tmp_path / "adapter/adapter_config.json")["options"] == expected


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path, capsys):
    (tmp_path / "config.json").write_text(r'{"model_type": "\ud800"}')
    code, out, err = run(capsys, "inspect", tmp_path / "config.json")
    assert (code, err) == (0, "") and out.endswith("config of a model (\\ud800)\n")


def test_the_config_beside_a_models_weights_is_a_config(tmp_path, capsys):
    make(tmp_path)
    assert document(capsys, tmp_path / "base/config.json")["kind"] == "config of a model (llama)"
    config = document(capsys, tmp_path / "adapter/adapter_config.json")
    assert config["kind"] == "config of a ResLoRA adapter" and config["options"]["r"] == 2


# ---- Folders of several adapters, and without weights


def test_results_with_an_adapter_in_each_folder_are_named(tmp_path, capsys):
    for name in ("none", "ms"):
        (tmp_path / "results" / name).mkdir(parents=True)
        model = make(tmp_path / "results" / name, res_mode=name)
        export_lora(model, tmp_path / "results" / name / "lora")
        (tmp_path / "results" / name / "base").rename(tmp_path / f"base-{name}")
    found = document(capsys, tmp_path / "results")
    assert found["kind"] == "folder of 4 adapters" and found["warnings"] == []
    kinds = {own["path"]: own["kind"] for own in found["adapters"]}
    lora, own = "plain LoRA (LORA)", "ResLoRA adapter"
    assert kinds == {"ms/adapter": own, "ms/lora": lora, "none/adapter": own, "none/lora": lora}
    single = document(capsys, tmp_path / "results/ms/adapter")
    assert found["adapters"][0] | {"path": 0} == single | {"path": 0}
    lines = run(capsys, "inspect", tmp_path / "results")[1].splitlines()
    assert lines[0] == f"{tmp_path / 'results'}: folder of 4 adapters" and len(lines) == 5
    assert lines[1].startswith("  ms/adapter: ResLoRA adapter, res_mode ms, pre_num 1, r 2, ")


def test_adapters_three_folders_deep_are_listed_beside_a_stray_file(tmp_path, capsys):
    make(tmp_path)
    for place in ("first", "runs/a/checkpoint-10"):
        shutil.copytree(tmp_path / "adapter", tmp_path / "all" / place)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "all/stray.safetensors")
    found = document(capsys, tmp_path / "all")
    assert found["kind"] == "folder of 2 adapters"
    assert [own["path"] for own in found["adapters"]] == ["first", "runs/a/checkpoint-10"]
    assert found["warnings"] == ["stray.safetensors beside them: not looked into"]


def test_the_folder_of_one_adapter_names_it(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "base").rename(tmp_path / "adapter" / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "adapter").rename(tmp_path / "run" / "adapter")
    found = document(capsys, tmp_path / "run")
    assert found["kind"] == "folder of 1 adapter" and found["adapters"][0]["path"] == "adapter"


def test_adapters_that_peft_saves_by_name_are_named_beside_the_first(tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    found = document(capsys, tmp_path)
    assert found["kind"] == "plain LoRA (LORA)" and found["options"]["r"] == 2
    (second,) = found["adapters"]
    assert (second["path"], second["options"]["r"], second["tensors"]) == ("second", 3, 6)
    assert "\n  second: plain LoRA (LORA), r 3, " in run(capsys, "inspect", tmp_path)[1]


def test_a_model_with_checkpoints_below_is_a_model(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "base" / "checkpoint-5")
    found = document(capsys, tmp_path / "base")
    assert found["kind"] == "tensors" and found["tensors"] == 30
    assert [own["path"] for own in found["adapters"]] == ["checkpoint-5"]


def test_a_damaged_adapter_among_others_is_a_warning(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"x")
    found = document(capsys, tmp_path)
    assert found["kind"] == "folder of 2 adapters" and len(found["adapters"]) == 1
    (sentence,) = found["warnings"]
    assert sentence.startswith("bad cannot be read: ")
    assert f"\nwarning: {sentence}" in run(capsys, "inspect", tmp_path)[1]


FOLDERS = [
    ({"config.json": {"model_type": "llama"}, "pytorch_model.bin": 0}, "config of a model (llama)"),
    (
        {"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.bin": 0},
        "config of a PEFT adapter (LORA)",
    ),
    (
        {"reslora_config.json": {"res_flag": 1}, "pytorch_model_lora.bin": 0},
        "config of a checkpoint of the authors' program (reslora convert reads its folder)",
    ),
    (
        {"model_index.json": {"_class_name": "FluxPipeline"}},
        "index of a pipeline of diffusers (FluxPipeline)",
    ),
]


@pytest.mark.parametrize(("files", "kind"), FOLDERS)
def test_a_folder_without_weights_to_read_is_told_by_its_config(tmp_path, capsys, files, kind):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    found = document(capsys, tmp_path)
    assert found["kind"] == kind and found["path"] == str(tmp_path)
    (sentence,) = found["warnings"]
    assert "itself has no weights that can be read" in sentence
    assert all(name in sentence for name in files if name.endswith(".bin"))


def test_a_model_whose_weights_are_damaged_is_not_told_by_its_config(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * 20)
    code, out, err = run(capsys, "inspect", tmp_path / "base")
    assert (code, out, err.count("\n")) == (1, "", 1) and "model.safetensors" in err


def test_json_with_a_byte_order_mark_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("{}", encoding="utf-8-sig")
    code, out, err = run(capsys, "inspect", path)
    sentence = f"{path} must be UTF-8 without a byte-order mark; got one"
    assert (code, out, err) == (1, "", f"reslora: [inspect] {sentence}\n")
