"""The commands plot, convert and doctor, and the pictures."""

import json
import os
import subprocess
import sys

import pytest
import torch
from models import adapted, clip_batch, randomize, tiny_clip, tiny_llama, tokens

import reslora
from reslora import _build_info, plots
from reslora.commands.cli import main
from reslora.injection.adapted import find_layers

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = adapted(tiny_llama(), 0.2, target_modules=TARGETS, res_mode="ms", pre_num=2).train()
    for _ in range(3):
        made(input_ids=tokens())
    return made


@pytest.fixture
def folder(tmp_path, model):
    reslora.save_pretrained(model, tmp_path / "adapter", statistics=True)
    return tmp_path / "adapter"


def lines_of(figure):
    return [list(line.get_ydata()) for line in figure.axes[0].lines]


# ---- Pictures ---------------------------------------------------------------------------------


def test_alphas_are_those_of_the_plan(model, folder):
    report = reslora.merge(model, "input")
    reslora.unmerge(model)
    wanted = {e.name: e.alpha_star[0] for e in report.layers if len(e.alpha_star)}
    for source in (model, folder):
        image = plots.alphas(source).axes[0].images[0].get_array()
        shown = sorted(float(v) for v in image.data.ravel() if v == v)
        assert shown == pytest.approx(sorted(wanted.values()), rel=1e-6)


def test_singular_values_are_those_of_the_difference(model, folder):
    plain = {n: p.clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    shown = [lines_of(plots.singular_values(source, "input")) for source in (model, folder)]
    reslora.merge(model, "input")
    for n, layer in enumerate(find_layers_by_chain(model)):
        delta = layer.base_layer.weight - plain[f"{layer.name}.base_layer.weight"]
        values = torch.linalg.svdvals(delta.double()).tolist()
        for lines in shown:
            assert lines[n] == pytest.approx(values[: len(lines[n])], rel=1e-3, abs=1e-6)


def find_layers_by_chain(model):
    return find_layers(model)[0].chain.injection.layers


def test_norm_windows_are_in_the_order_of_the_forwards():
    torch.manual_seed(0)
    model = adapted(res_mode="is", norm_window=3).train()
    seen = []
    for step in range(5):
        x = torch.randn(2, 6, dtype=torch.float64) * (1 + step)
        model(x)
        seen.append(float(x.norm()))
    assert lines_of(plots.norm_windows(model))[0] == pytest.approx(seen[-3:], rel=1e-5)
    with pytest.raises(ValueError, match="norms of training forwards must be at hand"):
        plots.norm_windows(adapted(res_mode="bs"))


def test_towers_of_a_model_have_columns_of_their_own():
    torch.manual_seed(0)
    made = adapted(tiny_clip(), 0.1, target_modules=TARGETS, res_mode="is").train()
    made(**clip_batch())
    shown = plots.alphas(made).axes[0].images[0].get_array()
    report = reslora.merge(made, "input")
    assert (~shown.mask if hasattr(shown, "mask") else shown == shown).any()
    wanted = sum(bool(len(entry.alpha_star)) for entry in report.layers)
    assert sum(v == v for v in shown.data.ravel().tolist()) == wanted


def test_loss_curves():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 5.0}]
    figure = plots.loss_curves({"trainer": history, "numbers": [4.0, 3.5]})
    assert lines_of(figure) == [[3.0, 2.0], [4.0, 3.5]]
    assert lines_of(plots.loss_curves({"a": history}, "eval_loss")) == [[5.0]]
    with pytest.raises(ValueError, match="a run must hold 'x'"):
        plots.loss_curves({"a": history}, "x")
    with pytest.raises(ValueError, match="runs must hold one at least"):
        plots.loss_curves({})


@pytest.mark.parametrize("kind", ["alpha", "norms", "singular-values"])
def test_the_command_draws_an_adapter(folder, tmp_path, kind, capsys):
    picture = tmp_path / "out.png"
    assert main(["plot", kind, str(folder), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", kind, str(folder), str(folder), str(picture)]) == 1
    assert "draws one adapter" in capsys.readouterr().err


def test_the_command_draws_losses(tmp_path, capsys):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    assert main(["plot", "losses", str(state), str(tmp_path / "out.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "out.svg")}
    assert main(["plot", "losses", str(tmp_path / "none"), str(tmp_path / "out.svg")]) == 1
    capsys.readouterr()
    for text, words in (
        ("{}", "read from a trainer_state.json"),
        ("[1, 2]", "must be a JSON object; got list"),
        ("none", "must be JSON"),
    ):
        state.write_text(text)
        assert main(["plot", "losses", str(state), str(tmp_path / "out.svg")]) == 1
        printed = capsys.readouterr().err
        assert words in printed and printed.count("\n") == 1


# ---- doctor -----------------------------------------------------------------------------------


def test_doctor_shows_versions_kernels_and_links(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    assert main(["doctor", "--model", str(tmp_path), "--res-mode", "ms", "--pre-num", "2"]) == 0
    text = capsys.readouterr().out
    assert f"reslora {reslora.__version__}, built with torch" in text
    assert "kernels on cpu: reslora's own (RESLORA_KERNELS=auto)" in text
    assert "model.layers.*.self_attn.q_proj: ms, 3 layers, 2 linked" in text
    assert main(["doctor", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert values["links"] == ""
    assert main(["doctor", "--model", str(tmp_path / "none")]) == 1
    assert f"no such folder: {tmp_path / 'none'}" in capsys.readouterr().err


def test_doctor_says_why_atens_form_is_used():
    printed = subprocess.run(
        [sys.executable, "-m", "reslora", "doctor"],
        env={**os.environ, "RESLORA_KERNELS": "aten"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "kernels on cpu: ATen's form (RESLORA_KERNELS=aten)" in printed


@pytest.mark.parametrize(
    ("torch_cuda", "built"), [("", "with torch {} without CUDA"), ("13.2", "without CUDA kernels")]
)
def test_doctor_says_how_to_get_the_kernels_that_are_missing(
    monkeypatch, capsys, torch_cuda, built
):
    monkeypatch.setattr(_build_info, "TORCH_CUDA", torch_cuda)
    monkeypatch.setattr(_build_info, "WITH_CUDA", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert main(["doctor"]) == 0
    assert (
        f"reslora was built {built.format(_build_info.TORCH_MINOR)} and found torch for CUDA 13: "
        "on a GPU it runs ATen's form; for its own kernels build reslora again with "
        "`pip install --no-build-isolation .` where nvcc for CUDA 13 is on PATH"
    ) in capsys.readouterr().out


def test_the_commands_work_in_a_pipe():
    command = f"{sys.executable} -m reslora doctor --json | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{\n"
    assert "Broken pipe" not in done.stderr
    command = f"{sys.executable} -m reslora doctor | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reslora ")
    assert "\x1b" not in done.stdout


# ---- convert ----------------------------------------------------------------------------------


def their_checkpoint(folder, res_flag, **changes):
    """A checkpoint as their program writes it, for the q and v layers of a tiny Llama."""
    torch.manual_seed(3)
    folder.mkdir()
    base = tiny_llama()
    tensors = {}
    for name, module in base.named_modules():
        if name.endswith(tuple(TARGETS)):
            tensors[f"{name}.loras.0.lora_A"] = torch.nn.Parameter(torch.randn(4, 16))
            tensors[f"{name}.loras.0.lora_B"] = torch.nn.Parameter(
                torch.randn(module.out_features, 4)
            )
    torch.save(tensors, folder / "pytorch_model_lora.bin")
    values = {
        "rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "start_index": 0, "target_modules": "q.v",
        "lora_num": 1, "merge_weights": True, "res_flag": res_flag, "merge_flag": 3, "pre_num": 999,
        "merge_4_len": 100,
    }  # fmt: skip
    (folder / "reslora_config.json").write_text(json.dumps(values | changes))
    return base, tensors


@pytest.mark.parametrize(("res_flag", "res_mode"), [(0, "none"), (1, "is"), (2, "bs"), (3, "ms")])
def test_a_checkpoint_of_the_authors_is_converted(tmp_path, capsys, res_flag, res_mode):
    base, tensors = their_checkpoint(tmp_path / "theirs", res_flag)
    base.save_pretrained(tmp_path / "base")
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "ours"), "--base", str(tmp_path / "base")]
    assert main(["convert", *arguments]) == 0
    assert f"res_mode {res_mode}, pre_num -1, r 4" in capsys.readouterr().out
    model = reslora.load(base, tmp_path / "ours")
    for layer in find_layers(model):
        torch.testing.assert_close(
            layer.reslora_A.data, tensors[f"{layer.name}.loras.0.lora_A"].data
        )
        torch.testing.assert_close(
            layer.reslora_B.data, tensors[f"{layer.name}.loras.0.lora_B"].data
        )
    config = layer.chain.config
    assert (config.res_mode, config.pre_num, config.lora_alpha, config.lora_dropout) == (
        res_mode, -1, 8, 0.1,
    )  # fmt: skip
    assert config.merge_method == {"is": "weight", "ms": "factored"}.get(res_mode)


def test_their_other_forms_are_refused(tmp_path, capsys):
    base, tensors = their_checkpoint(tmp_path / "theirs", 1)
    base.save_pretrained(tmp_path / "base")
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--base"]
    weights = tmp_path / "theirs" / "pytorch_model_lora.bin"
    other = dict(tensors)
    other["model.layers.0.self_attn.q_proj.loras.1.lora_A"] = torch.randn(4, 16)
    torch.save(other, weights)
    assert main([*arguments, str(tmp_path / "base")]) == 1
    assert "a layer must have one LoRA" in capsys.readouterr().err
    other = {key: value for key, value in tensors.items() if "layers.2" not in key}
    other["model.layers.9.self_attn.q_proj.loras.0.lora_A"] = torch.randn(4, 16)
    other["model.layers.9.self_attn.q_proj.loras.0.lora_B"] = torch.randn(16, 4)
    torch.save(other, weights)
    assert main([*arguments, str(tmp_path / "base")]) == 1
    assert "model.layers.9.self_attn.q_proj" in capsys.readouterr().err
    torch.save([torch.ones(2)], weights)
    assert main([*arguments, str(tmp_path / "base")]) == 1
    assert "must hold tensors by name" in capsys.readouterr().err
    weights.write_bytes(b"nothing")
    assert main([*arguments, str(tmp_path / "base")]) == 1
    assert "must hold tensors" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    assert main([*arguments, str(tmp_path / "none")]) == 1
    randomize(base)
