"""The command `reslora inspect`: what a file or folder is said to hold."""

import json

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
    assert found["statistics"].startswith("norms of 6 layers, fits of 4 (largest residual 0.")
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
