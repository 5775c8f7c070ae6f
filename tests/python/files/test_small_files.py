"""A small file costs little: what it says is compared with what it holds before memory is taken."""

import json
import resource

import pytest
import torch
from models import Net, adapted

from reslora import _C, load, save_pretrained
from reslora.injection.adapted import find_layers

GREEDY = [{"r": 8_000_000}, {"rank_pattern": {"layers.1.lin": 8_000_000}}]


def resealed(folder, **options):
    """Give the two files of an adapter other options, under a checksum that is right."""
    save_pretrained(adapted(Net(), res_mode="is"), folder)
    path = folder / "adapter_model.safetensors"
    read = _C.load_adapter(path)
    values = json.loads(read.config_json) | options
    _C.save_adapter(path, json.dumps(values), read.chains, read.tensors)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    assert path.stat().st_size < 4000


def grown(call, match):
    """Return by how many bytes the largest memory has grown in a call that is refused."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=match):
        call()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.parametrize("options", GREEDY)
def test_ranks_are_compared_with_the_chains_before_a_layer_is_made(options, tmp_path):
    resealed(tmp_path, **options)
    model = Net()
    assert grown(lambda: load(model, tmp_path), "first difference .* r 8000000") < 2e8
    assert not find_layers(model)


@pytest.mark.parametrize("options", GREEDY)
def test_the_plug_in_compares_ranks_before_a_layer_is_made(options, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import reslora.peft  # noqa: F401

    resealed(tmp_path, **options)
    model = Net()
    peft.PeftModel.from_pretrained(Net(), other(tmp_path / "other"))  # what is imported on the way

    def read():
        peft.PeftModel.from_pretrained(model, tmp_path)

    sentence = r"must agree on .* r and scaling; got 8000000 and .* for layers\.\d\.lin"
    assert grown(read, sentence) < 2e8


def other(folder):
    save_pretrained(adapted(Net(), res_mode="is"), folder)
    return folder


def test_windows_of_norms_are_bounded(tmp_path):
    save_pretrained(adapted(Net(), res_mode="is"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_window": 2**20}))
    with pytest.raises(ValueError, match=r"norm_window must be .*at most 131072; got 1048576"):
        load(Net(), tmp_path)


def test_a_file_of_right_ranks_is_loaded(tmp_path):
    save_pretrained(adapted(Net(), r=4, rank_pattern={"layers.1.lin": 2}), tmp_path)
    assert [x.r for x in find_layers(load(Net(), tmp_path))] == [4, 2, 4, 4]
    assert torch.isfinite(load(Net(), tmp_path)(torch.ones(1, 6))).all()
