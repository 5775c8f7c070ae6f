"""What the command reslora says of itself, and that nothing of others stands between its lines."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from cli_samples import LETTERS, make, run, write_tokenizer

from reslora.commands.cli import main
from reslora.commands.options import COMMANDS, make_parser

NAMES = ["merge", "export-lora", "inspect", "check-export", "plot", "convert", "doctor"]


def reslora(*arguments, cwd=None):
    """Run the command in a process of its own, with the libraries' bars as they are by default."""
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    command = [sys.executable, "-m", "reslora", *arguments]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, check=False)


def write_their_checkpoint(folder):
    """Write two adapted layers of a tiny Llama as the authors' program does."""
    folder.mkdir()
    factors = {}
    for layer in (0, 1):
        key = f"model.layers.{layer}.self_attn.q_proj.loras.0.lora_"
        factors |= {f"{key}A": torch.ones(2, 16), f"{key}B": torch.ones(16, 2)}
    torch.save(factors, folder / "pytorch_model_lora.bin")
    values = {"rank": 2, "lora_alpha": 2, "res_flag": 1, "pre_num": 1}
    (folder / "reslora_config.json").write_text(json.dumps(values))


def test_without_arguments_a_short_help_names_every_command():
    done = reslora()
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.partition(":")[0] for line in lines if line.startswith(tuple(NAMES))] == NAMES
    examples = [line.strip() for line in lines if line.startswith("  reslora ")]
    assert [example.split()[1] for example in examples] == NAMES
    for example in examples:
        make_parser().parse_args(shlex.split(example)[1:])


@pytest.mark.parametrize("columns", ["80", "200"])
def test_every_help_fits_80_columns(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert [command.name for command in COMMANDS] == NAMES
    for arguments in ([], *([name] for name in NAMES)):
        code, out, _ = run(capsys, *arguments, "--help")
        lines = out.splitlines()
        assert code == 0 and lines[0].startswith("usage: reslora")
        assert [line for line in lines if len(line) > 80] == []
        assert arguments == [] or "example:" in lines


@pytest.mark.parametrize("given", [["--js"], ["inspect", "x", "--js"], ["--versio"]])
def test_options_are_not_abbreviated(capsys, given):
    code, out, err = run(capsys, *given)
    assert (code, out) == (2, "") and err.startswith("usage: reslora")


def test_what_cannot_be_understood_fits_80_columns_but_for_the_sentence(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = run(capsys, "plot")
    assert code == 2 and all(len(line) <= 80 for line in err.splitlines()[:-1])


def test_bars_of_libraries_do_not_stand_between_our_lines(tmp_path):
    make(tmp_path)
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text").write_text(" ".join(LETTERS * 2))
    done = reslora("merge", "base", "adapter", "out", "--verify", "text", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["out:", "on"]
    done = reslora("doctor", "--model", "base", "--target", "q_proj", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "q_proj: is, 3 layers" in done.stdout
    write_their_checkpoint(tmp_path / "theirs")
    done = reslora("convert", "theirs", "ours", "--base", "base", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("ours: res_mode is")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_are_for_terminals(monkeypatch, capsys, is_terminal):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert main(["inspect", "none"]) == 1
    assert os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == (None if is_terminal else "1")


def test_what_the_user_has_said_of_bars_stays(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    assert main(["inspect", "none"]) == 1
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
