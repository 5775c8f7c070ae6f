"""Folders that this and earlier versions wrote go on to be read: see tests/data/make_folders.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import reslora
from reslora import _C

DATA = Path(__file__).parents[2] / "data"
spec = importlib.util.spec_from_file_location("make_folders", DATA / "make_folders.py")
make_folders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_folders)


@pytest.fixture(scope="module")
def values():
    return _C.load_tensors(DATA / "folder_values.safetensors")[0]


def base_for(folder, values):
    base = make_folders.base_for(folder)
    base.load_state_dict({k: t for k, t in values.items() if k.startswith("layers.")})
    return base.eval()


@pytest.mark.parametrize("folder", make_folders.FOLDERS)
def test_a_folder_means_what_it_meant(folder, values):
    model = reslora.load(base_for(folder, values), DATA / f"folder_{folder}").eval()
    torch.testing.assert_close(model(values["x"]), values[f"{folder} y"], rtol=1e-5, atol=1e-6)
    merged = reslora.merge_and_unload(model)(values["x"])
    torch.testing.assert_close(merged, values[f"{folder} merged"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", make_folders.FOLDERS)
def test_peft_reads_it_too(folder, values):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("reslora.peft")
    base = base_for(folder, values)
    model = peft.PeftModel.from_pretrained(base, DATA / f"folder_{folder}").eval()
    torch.testing.assert_close(model(values["x"]), values[f"{folder} y"], rtol=1e-5, atol=1e-6)


def test_the_folders_are_of_all_formats():
    formats = {
        _C.load_tensors(path)[1]["reslora.format"]
        for path in DATA.glob("folder_*/adapter_model.safetensors")
    }
    assert formats == {"1", "2"}  # a new format needs a folder here
