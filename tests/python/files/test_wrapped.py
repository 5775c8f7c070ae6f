"""Models that torch has wrapped, whole or in parts: files have the names of the plain model."""

import copy
from functools import partial

import pytest
import torch
from models import Net, adapted, randomize
from older_files import rename_saved
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import reslora
from reslora.injection.adapted import find_layers

compiled = partial(torch.compile, backend="eager")
NAMES = [f"layers.{n}.lin" for n in range(4)]


def layers_in(wrap, model):
    for n, layer in enumerate(model.layers):
        model.layers[n] = wrap(layer)
    return model


def targets_in(wrap, model):
    for block in model.layers:
        block.lin = wrap(block.lin)
    return model


WRAPS = {
    "model": compiled,
    "layers": partial(layers_in, compiled),
    "checkpoints": partial(layers_in, checkpoint_wrapper),
    "targets": partial(targets_in, checkpoint_wrapper),
    "compiled targets": partial(targets_in, compiled),
}


def adapt(model, how):
    options = {"r": 2, "target_modules": ["lin"], "res_mode": "is"}
    if how == "inject":
        return reslora.inject(model, reslora.ResLoraConfig(**options))
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from reslora.peft import ResLoraConfig

    return peft.get_peft_model(model, ResLoraConfig(**options))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def wrapped_after(model, wrap):
    """Wrap the layers of an adapted model, which may lie in one of PEFT."""
    if wrap == "model":
        return WRAPS[wrap](model)
    WRAPS[wrap](model.get_base_model() if hasattr(model, "get_base_model") else model)
    return model


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("how", ["inject", "peft"])
def test_what_a_wrapped_model_saves_fits_the_plain_one(tmp_path, how, is_before, wrap):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import reslora.peft

    base, x = Net(), torch.randn(3, 6)
    model = copy.deepcopy(base)
    model = adapt(WRAPS[wrap](model), how) if is_before else wrapped_after(adapt(model, how), wrap)
    randomize(model)(x).sum().backward()
    assert [layer.name for layer in find_layers(model)] == NAMES
    wanted = model(x)
    if how == "peft":
        model.save_pretrained(tmp_path)
    else:
        reslora.save_pretrained(model, tmp_path)
    for plain in (base, WRAPS[wrap](copy.deepcopy(base))):
        for read in (reslora.load, peft.PeftModel.from_pretrained):
            torch.testing.assert_close(read(copy.deepcopy(plain), tmp_path)(x), wanted)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("how", ["inject", "peft"])
def test_a_wrapped_model_is_unloaded(how, wrap):
    base, x = Net(), torch.randn(3, 6)
    wanted = base(x)
    model = adapt(WRAPS[wrap](copy.deepcopy(base)), how)
    assert not torch.allclose(randomize(model)(x), wanted)
    torch.testing.assert_close(reslora.unload(model)(x), wanted)


def test_a_head_of_a_compiled_model_is_saved_by_its_plain_name(tmp_path):
    base, x = torch.nn.Sequential(Net(), torch.nn.Linear(6, 2)), torch.randn(3, 6)
    config = reslora.ResLoraConfig(target_modules=["lin"], modules_to_save=["1"], res_mode="is")
    model = randomize(reslora.inject(compiled(copy.deepcopy(base)), config))
    wanted = model(x)
    reslora.save_pretrained(model, tmp_path)
    torch.testing.assert_close(reslora.load(copy.deepcopy(base), tmp_path)(x), wanted)


@pytest.mark.parametrize("hold", [AveragedModel, torch.nn.DataParallel])
def test_a_model_in_a_holder_is_saved_by_its_plain_names(tmp_path, hold):
    base, x = torch.nn.Sequential(Net(), torch.nn.Linear(6, 2)), torch.randn(3, 6)
    config = reslora.ResLoraConfig(target_modules=["lin"], modules_to_save=["1"], res_mode="is")
    model = hold(reslora.inject(copy.deepcopy(base), config))
    wanted = randomize(model).eval()(x)
    reslora.save_pretrained(model, tmp_path / "adapter")
    loaded = reslora.load(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(x), wanted)
    reslora.export_lora(model, tmp_path / "lora", merge_method="weight")
    with pytest.raises(ValueError, match=f"before it is wrapped; got a {hold.__name__}"):
        reslora.inject(hold(base), config)


@pytest.mark.parametrize("part", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_older_folders_with_names_of_wrappers_are_read(tmp_path, part):
    model = adapted(res_mode="is")
    x = torch.randn(5, 6, dtype=torch.float64)
    reslora.calibrate(model.train(), [x, x])
    reslora.save_pretrained(model, tmp_path, statistics=True)

    def older(name):
        return name.replace("layers.", f"{part}.layers.").replace(".lin", f".{part}.lin")

    rename_saved(tmp_path, older)
    base = reslora.unload(copy.deepcopy(model))
    loaded = reslora.load(base, tmp_path)
    assert torch.equal(loaded(x), model(x))
    reports = [reslora.merge_report(m, [x]) for m in (model, loaded)]
    assert reports[0].rule == reports[1].rule == "lsq"
    assert reports[0].output_error == pytest.approx(reports[1].output_error)
