"""The Python modules give what tests/data says; adapters_test.cpp checks the C++ ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import reslora
from reslora import _C

DATA = Path(__file__).parents[2] / "data"
spec = importlib.util.spec_from_file_location("make_parity", DATA / "make_parity.py")
make_parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_parity)


@pytest.mark.parametrize("case", make_parity.CASES)
def test_python_modules_agree_with_the_file(case, tmp_path):
    values, _ = _C.load_tensors(str(DATA / f"parity_{case}_values.safetensors"))
    x, y, merged = values.pop("x"), values.pop("y"), values.pop("merged", None)
    model = make_parity.Stack()
    model.load_state_dict(values)
    adapter = DATA / f"parity_{case}.safetensors"
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter.read_bytes())
    config = json.loads(_C.load_adapter(str(adapter)).config_json)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    reslora.load(model, tmp_path)
    torch.testing.assert_close(model(x), y, rtol=1e-13, atol=1e-14)
    if merged is not None:  # by the fits of the statistics' file
        statistics = DATA / f"parity_{case}_statistics.safetensors"
        (tmp_path / "adapter_statistics.safetensors").write_bytes(statistics.read_bytes())
        reslora.load(model, tmp_path)
        reslora.merge(model, "lsq")
        torch.testing.assert_close(model(x), merged, rtol=1e-13, atol=1e-14)
