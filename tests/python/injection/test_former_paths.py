"""What `torch.save` wrote when the classes stood in other modules loads, and computes the same.

`tests/data/pickled_models.pt` holds a calibrated and refined model (a group of layers, taps), a
merged one, their inputs `x` [6, 4] and outputs, a config, and reports; `pickled_peft_model.pt` a
model of PEFT. Both were written by version 0.1.0, when `python/reslora` was one folder.
"""

import importlib
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from reslora import (
    Calibration,
    MergeReport,
    Refinement,
    ResLoraConfig,
    merge,
    merge_report,
    print_links,
)
from reslora._former_paths import NOW
from reslora.injection.adapted import injection_of

DATA = Path(__file__).parents[2] / "data"
FILES = ("pickled_models.pt", "pickled_peft_model.pt")


def load(name):
    return torch.load(DATA / name, weights_only=False)


def classes_in(name):
    """Return "module class" of ours that a file of torch.save names."""
    with zipfile.ZipFile(DATA / name) as archive:
        pickled = next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        found = pickletools.genops(archive.read(pickled))
    return {a for op, a, _ in found if op.name == "GLOBAL" and a.startswith("reslora.")}


def test_an_adapted_model_loads_and_goes_on():
    saved = load(FILES[0])
    model, x = saved["adapted"], saved["x"]
    torch.testing.assert_close(model(x), saved["adapted_y"], rtol=0, atol=0)
    assert "layers, 1 linked" in print_links(model)
    assert merge_report(model, [x]).rule == "refined"  # by the fits that it brings
    model.train()(x).sum().backward()
    merge(model)


def test_a_merged_model_loads_without_its_originals():
    saved = load(FILES[0])
    torch.testing.assert_close(saved["merged"](saved["x"]), saved["merged_y"], rtol=0, atol=0)
    assert injection_of(saved["merged"], "test").applied.plan is None


def test_reports_and_configs_load():
    saved = load(FILES[0])
    assert [type(report) for report in saved["reports"]] == [MergeReport, Calibration, Refinement]
    assert isinstance(saved["config"], ResLoraConfig) and "alpha*" in str(saved["reports"][0])


def test_a_model_of_peft_loads_where_nothing_is_imported_yet():
    program = f"import torch; s = torch.load({str(DATA / FILES[1])!r}, weights_only=False)\n"
    program += "assert torch.equal(s['model'](s['x']), s['y'])"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=200)


def test_every_class_that_a_file_names_is_one_of_those_kept():
    named = {tuple(place.split()) for file in FILES for place in classes_in(file)}
    gone = {(f"reslora.{module}", name) for module, names in NOW.items() for name in names}
    moved = {("reslora.starting", "Start")}  # a report that is in neither file
    same = {
        place for place in named if place[0] in ("reslora._C", "reslora.config", "reslora.peft")
    }
    assert gone - moved == named - same
    for module, name in gone:
        assert getattr(importlib.import_module(module), name).__name__ == name


def test_other_names_are_not_found_in_former_modules():
    with pytest.raises(ImportError, match="Ahead"):
        importlib.import_module("reslora.layer")
        from reslora.grouping import Ahead  # noqa: F401
