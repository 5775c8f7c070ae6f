"""The guides: their examples run in the order of the page, their tables are true."""

from __future__ import annotations

import re

import features
import matplotlib
import pytest
import torch
from cpp_programs import REPOSITORY
from models import tokenizer
from test_readme import adapted, small_llama, train

import reslora
from reslora.commands.cli import main

GUIDES = sorted((REPOSITORY / "examples/guides").glob("*.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def names_for(folder):
    """What the pages take for granted."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    torch.manual_seed(0)
    base = small_llama()
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    batches = [{"input_ids": torch.randint(3, 60, (8, 24))} for _ in range(8)]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    return {
        "model": adapted(base), "train": train, "batches": batches, "held_out": batches[:1],
        "dataset": [{"input_ids": row, "labels": row} for row in rows], "tokenizer": tokenizer(),
        "texts": datasets.Dataset.from_dict({"text": ["a b c d e f", "f e d c b a"] * 8}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "guide", [g for g in GUIDES if blocks(g.read_text(), "python")], ids=lambda g: g.stem
)
def test_the_examples_of_a_guide_run_in_order(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = names_for(tmp_path)
    if guide.stem == "scaling":
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        names["mesh"] = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    try:
        for number, example in enumerate(blocks(guide.read_text(encoding="utf-8"), "python")):
            exec(compile(example, f"{guide.name}, example {number}", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_the_commands_of_the_guides_are_understood(capsys):
    for guide in GUIDES:
        for line in re.findall(r"^reslora (.*)$", guide.read_text(encoding="utf-8"), re.M):
            assert main([*line.split()[:1], "--help"]) == 0
            known = capsys.readouterr().out
            for option in re.findall(r"--[\w-]+", line):
                assert option in known, line


def test_the_features_are_those_that_tests_show():
    guide = features.GUIDE.read_text(encoding="utf-8")
    assert guide == features.filled(guide), "run python tests/python/helpers/features.py"
    for feature, test in features.FEATURES:
        if "::" in test:
            name, _, function = test.partition("::")
            assert function in features.tests_of(name), feature


def test_the_tables_of_options_name_what_is_there():
    guide = features.GUIDE.read_text(encoding="utf-8")
    known = {field.name for field in __import__("dataclasses").fields(reslora.ResLoraConfig)}
    table = guide[guide.index("## Options") : guide.index("## What works")]
    missing = known - set(re.findall(r"`(\w+)`", table))
    # Set by the package itself, or said elsewhere on the page.
    assert missing <= {"finished_from", "finished_step"}
    from reslora.config import REFUSED

    assert set(REFUSED) <= set(re.findall(r"`(\w+)`", table))


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    notebook = nbformat.read(REPOSITORY / "examples/quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without results
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=200, resources=resources).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "lsq: KL" in text
    assert "the merged model is a LlamaForCausalLM" in text
    assert (tmp_path / "lora/adapter_config.json").is_file()
