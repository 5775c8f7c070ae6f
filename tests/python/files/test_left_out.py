"""Links that are left out, since calls cannot be paired: in files, merges and calibrations."""

import copy
import json
import warnings

import pytest
import safetensors
import torch
from models import Net, adapted, randomize, x_of

from reslora import ResLoraConfig, calibrate, inject, load, merge, merge_and_unload, save_pretrained
from reslora._C import LayerShape
from reslora.commands.inspect import inspect
from reslora.injection.adapted import find_layers, injection_of

MODES = [("is", 1), ("ms", 2), ("ms", -1)]


class Uneven(Net):
    """The first layer runs on two inputs, those after it on the second of them alone."""

    def forward(self, x):
        self.layers[0](x.flip(0))
        return super().forward(x)


def uneven(res_mode, pre_num, **options):
    """An adapted model that has found out, in a forward, which calls cannot be paired."""
    model = adapted(Uneven(depth=4).double(), res_mode=res_mode, pre_num=pre_num, **options)
    with pytest.warns(UserWarning, match="unknown which of their calls"):
        model(x_of())
    return model


def plain(model):
    """A model like it before it was adapted."""
    base = Uneven(depth=4).double()
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    base.load_state_dict({k: v for k, v in state.items() if "reslora" not in k})
    return base


def header(folder):
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("res_mode", "pre_num"), MODES)
@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_loaded_model_reads_the_right_taps_from_its_first_forward_on(
    res_mode, pre_num, is_adapted, tmp_path
):
    model = uneven(res_mode, pre_num)
    save_pretrained(model, tmp_path)
    other = plain(model)
    if is_adapted:
        inject(other, injection_of(model, "test").config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(other, tmp_path)
        got = loaded(x_of())
    assert torch.equal(got, model(x_of()))
    assert [x.left_out.keys() for x in find_layers(loaded)] == [
        x.left_out.keys() for x in find_layers(model)
    ]
    save_pretrained(loaded, tmp_path / "again")
    assert header(tmp_path / "again") == header(tmp_path)


def test_only_files_that_leave_links_out_have_the_newer_format(tmp_path):
    model = uneven("ms", 2)
    save_pretrained(model, tmp_path / "uneven")
    save_pretrained(adapted(res_mode="ms", pre_num=2), tmp_path / "even")
    assert header(tmp_path / "uneven")["reslora.format"] == "2"
    assert header(tmp_path / "even")["reslora.format"] == "1"
    layers = json.loads(header(tmp_path / "uneven")["reslora.chains"])[0]["layers"]
    assert [layer.get("left_out") for layer in layers] == [None, [0], [0], None]
    assert "left_out" not in header(tmp_path / "even")["reslora.chains"]
    warned = inspect(tmp_path / "uneven").warnings
    assert "layers.2.lin reads no tap of layers.0.lin: their calls could not be paired" in warned


@pytest.mark.parametrize(("res_mode", "pre_num"), MODES)
def test_a_layer_without_its_links_merges_exactly(res_mode, pre_num):
    model = uneven(res_mode, pre_num)
    for layer in find_layers(model)[2:]:
        layer.reslora_B.data.zero_()  # these are linked, and merged by an approximation
    want = model(x_of())
    merged = merge_and_unload(copy.deepcopy(model), merge_method="weight")
    torch.testing.assert_close(merged(x_of()), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("res_mode", "pre_num"), MODES)
def test_a_calibration_that_finds_it_out_starts_anew(res_mode, pre_num):
    model = uneven(res_mode, pre_num)
    fresh = copy.deepcopy(model)
    for layer in find_layers(fresh):
        layer.left_out = {}
    batches = [x_of(seed, 20) for seed in range(3)]
    calibrate(model, batches)
    want = injection_of(model, "test").calibrated.fits
    with pytest.warns(UserWarning, match="unknown which of their calls"):
        calibrate(fresh, batches)
    got = injection_of(fresh, "test").calibrated.fits
    assert got.keys() == want.keys() and "layers.1.lin" not in got
    assert all(torch.equal(got[name].A, want[name].A) for name in got)
    for layer in find_layers(fresh):
        layer.left_out = {}
    with (
        pytest.warns(UserWarning, match="unknown which of their calls"),
        pytest.raises(ValueError, match=r"starts anew, .* can be read once"),
    ):
        calibrate(fresh, iter(batches))
    calibrate(fresh, iter(batches))  # it is known by now


def test_fits_made_before_a_link_was_left_out_are_refused(tmp_path):
    model = uneven("ms", 2)
    for layer in find_layers(model):
        layer.left_out = {}
    injection = injection_of(model, "test")
    model.forward = lambda x: Net.forward(model, x)
    calibrate(model, [x_of(1, 20), x_of(2, 20)])
    save_pretrained(model, tmp_path, statistics=True)
    del model.forward
    with pytest.warns(UserWarning, match="unknown which of their calls"):
        model(x_of())
    assert injection.calibrated is not None
    for call in (lambda: merge(model), lambda: save_pretrained(model, tmp_path, statistics=True)):
        with pytest.raises(ValueError, match="fits must be of the adapter as it is"):
            call()


def test_fits_go_through_a_file_with_links_left_out(tmp_path):
    model = uneven("ms", 2)
    calibrate(model, [x_of(1, 20), x_of(2, 20)])
    save_pretrained(model, tmp_path, statistics=True)
    loaded = load(plain(model), tmp_path)
    assert merge(loaded).rule == "lsq"
    merge(model)
    assert torch.equal(loaded(x_of()), model(x_of()))


def test_layers_of_older_pickles_leave_nothing_out():
    shape = LayerShape("l", 4, 4, 2, 1.0, [])
    older = LayerShape.__new__(LayerShape)
    older.__setstate__(("l", 4, 4, 2, 1.0))
    assert older == shape and older.left_out == []
    newer = copy.deepcopy(LayerShape("l", 4, 4, 2, 1.0, [0, 3]))
    assert newer.left_out == [0, 3]


@pytest.mark.parametrize("left_out", [[-1], [2], [7]])
def test_files_that_leave_out_what_is_not_there_are_refused(left_out, tmp_path):
    from reslora import _C

    shapes = [LayerShape(f"l{n}", 4, 4, 2, 1.0, left_out if n == 2 else []) for n in range(3)]
    tensors = {}
    for n in range(3):
        tensors |= {
            f"l{n}.reslora_A.weight": torch.ones(2, 4),
            f"l{n}.reslora_B.weight": torch.ones(4, 2),
        }
    with pytest.raises(ValueError, match="may leave out layers before it"):
        _C.save_adapter(tmp_path / "a.safetensors", "{}", [("l", shapes)], tensors)


def test_the_plug_ins_file_knows_what_was_left_out(tmp_path):
    peft = pytest.importorskip("peft")
    from reslora.peft import ResLoraConfig as PeftOptions

    model = peft.get_peft_model(
        Uneven(depth=4).double(), PeftOptions(r=2, res_mode="is", target_modules=["lin"])
    )
    randomize(model)
    with pytest.warns(UserWarning, match="unknown which of their calls"):
        model(x_of())
    model.save_pretrained(tmp_path)
    base = Uneven(depth=4).double()
    state = {
        k.removeprefix("base_model.model.").replace(".base_layer", ""): v
        for k, v in model.state_dict().items()
        if "reslora" not in k
    }
    base.load_state_dict(state)
    loaded = load(base, tmp_path)
    torch.testing.assert_close(loaded(x_of()), model(x_of()))
    assert isinstance(injection_of(loaded, "test").config, ResLoraConfig)


@pytest.mark.parametrize(("res_mode", "pre_num"), MODES)
def test_a_file_without_such_links_puts_them_back(res_mode, pre_num, tmp_path):
    even = adapted(Net().double(), res_mode=res_mode, pre_num=pre_num)
    save_pretrained(even, tmp_path)
    model = uneven(res_mode, pre_num)
    for own, other in zip(find_layers(model), find_layers(even), strict=True):
        own.base_layer.load_state_dict(other.base_layer.state_dict())
    model.forward = lambda x: Net.forward(model, x)
    load(model, tmp_path)
    assert torch.equal(model(x_of()), even(x_of()))
    save_pretrained(model, tmp_path / "again")
    assert header(tmp_path / "again")["reslora.format"] == "1"
