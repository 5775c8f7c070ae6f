"""The Python examples on small settings: they run, and what they print and write is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "python"
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the data folder ../shared/data is absent"
)


def run(program, *arguments, code=0):
    command = [sys.executable, str(FOLDER / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_train_lm(tmp_path):
    options = ["--steps", 4, "--pretrain-steps", 3, "--seq-len", 32, "--batch-size", 2]
    options += ["--cache", tmp_path / "cache", "--output", tmp_path / "out", "--finish-at", 0.5]
    done = run("train_lm.py", *options)
    assert "trainable params" in done.stdout
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (config["finished_from"], config["lora_alpha"]) == ("is", 8)
    assert (tmp_path / "out/merged/model.safetensors").is_file()
    done = run("train_lm.py", "--model", tmp_path / "none", code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train_lm: --model must name a folder")


@needs_data
@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_glue(tmp_path, task):
    options = ["--task", task, "--data", DATA, "--steps", 2, "--pretrain-steps", 2]
    done = run("glue.py", *options, "--length", 16, "--batch-size", 4, "--output", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    names = ["LoRA", "LoRA, doubled alpha", "is", "bs", "ms"]
    assert [entry["method"] for entry in results] == names
    assert all(0 <= entry["merged"] <= 1 for entry in results)
    assert all(name in done.stdout for name in names)
    config = json.loads((tmp_path / "ms" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["pre_num"]) == (4, 16, 4)


@needs_data
def test_text_to_image(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    options = ["--data", DATA / "dungeon_tiles", "--output", tmp_path, "--pretrain-steps", 2]
    run("text_to_image.py", *options, "--steps", 2, "--samples", 2, "--batch-size", 4)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    names = ["before", "LoRA", "LoRA, doubled alpha", "is", "bs", "ms"]
    assert [entry["method"] for entry in results] == names
    assert (
        diffusers.__version__ and (tmp_path / "lora-is/pytorch_lora_weights.safetensors").is_file()
    )


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        ("train_lm.py", ["--seq-len", "0"], "--seq-len must be at least 8; got 0"),
        ("train_lm.py", ["--data", "none.txt"], "--data must name a text file; got 'none.txt'"),
        ("glue.py", ["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        ("glue.py", ["--steps", "many"], "--steps must be a whole number; got 'many'"),
        ("text_to_image.py", ["--samples", "-1"], "--samples must be at least 1; got -1"),
        ("text_to_image.py", ["--lr", "nan"], "--lr must be above 0 and finite; got nan"),
        ("text_to_image.py", ["--output", __file__], "--output must name a folder"),
    ],
)
def test_bad_options_are_one_sentence(program, options, words):
    done = run(program, *options, code=2)
    assert done.stderr.startswith(f"{program.removesuffix('.py')}: {words}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", ["glue.py", "text_to_image.py"])
def test_absent_data_is_said_in_a_sentence(tmp_path, program):
    options = ["--output", tmp_path / "out"]
    done = run(program, "--data", tmp_path / "none", *options, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{program.removesuffix('.py')}: --data must hold ")
