"""save_pretrained and load: round trips, strictness, nothing half-loaded."""

import copy
import json
import shutil

import pytest
import safetensors.torch
import torch
from models import SHORTCUTS, Net, adapted, randomize, tiny_bert, tiny_llama, tokens, trained

from reslora import ResLoraConfig, export_lora, inject, load, merge, save_pretrained
from reslora.files import checkpoint
from reslora.injection.adapted import find_layers, injection_of

DOUBLE = {"dtype": torch.float64}


def x_of():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0), **DOUBLE)


def state_of(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, type(m), len(m._forward_hooks)) for name, m in model.named_modules()],
        [p.requires_grad for p in model.parameters()],
    )


def assert_unchanged(model, before):
    after = state_of(model)
    assert after[1:] == before[1:] and list(after[0]) == list(before[0])
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_a_saved_adapter_loads_into_a_plain_model(tmp_path, res_mode, pre_num):
    model = adapted(res_mode=res_mode, pre_num=pre_num, r=3, use_rslora=True)
    save_pretrained(model, tmp_path / "new" / "adapter")
    other = Net().double()
    base = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    other.load_state_dict({k: v for k, v in base.items() if "reslora" not in k})
    assert load(other, tmp_path / "new" / "adapter") is other
    assert torch.equal(other(x_of()), model(x_of()))
    assert injection_of(other, "test").config == injection_of(model, "test").config
    names = sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_files_are_read_by_the_safetensors_package(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 8
    layer = model.layers[2].lin
    assert torch.equal(tensors["base_model.model.layers.2.lin.reslora_A.weight"], layer.reslora_A)
    assert torch.equal(tensors["base_model.model.layers.2.lin.reslora_B.weight"], layer.reslora_B)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "RESLORA" and values["reslora_version"]
    assert "reslora.load" in (tmp_path / "README.md").read_text()


def test_an_adapted_model_loads_in_place(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path)
    want = model(x_of())
    parameters = trained(model)
    randomize(model)
    load(model, tmp_path)
    assert torch.equal(model(x_of()), want)
    assert all(a is b for a, b in zip(trained(model), parameters, strict=True))


def test_modules_to_save_are_saved_and_loaded(tmp_path):
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    model, ids = tiny_bert(), tokens()
    base = copy.deepcopy(model)
    adapted(model, 0.2, **options).eval()
    save_pretrained(model, tmp_path)
    load(base, tmp_path)
    assert torch.equal(base.classifier.weight, model.classifier.weight)
    torch.testing.assert_close(base(ids).logits, model(ids).logits, rtol=0, atol=0)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.classifier.{part}" for part in ("weight", "bias")} <= set(keys)


def test_a_disk_that_fills_between_two_files_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    save_pretrained(adapted(res_mode="is"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", full)  # after the tensors
    with pytest.raises(OSError, match="No space"):
        save_pretrained(adapted(res_mode="ms"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_merged_model_saves_its_unmerged_adapter(tmp_path):
    model = adapted(res_mode="bs")
    other = copy.deepcopy(model)
    merge(model)
    save_pretrained(model, tmp_path)
    randomize(other)
    load(other, tmp_path)
    torch.testing.assert_close(other(x_of()), model(x_of()))
    with pytest.raises(ValueError, match="must not be merged"):
        load(model, tmp_path)


def test_an_adapter_of_zeros_warns(tmp_path):
    model = inject(Net(), ResLoraConfig(target_modules=["lin"]))
    save_pretrained(model, tmp_path)
    with pytest.warns(UserWarning, match="every B is zero"):
        load(Net(), tmp_path)


def test_fp64_adapters_load_into_fp32_models(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path)
    other = load(Net(), tmp_path)
    layer = find_layers(other)[1]
    assert layer.reslora_A.dtype == torch.float32
    torch.testing.assert_close(layer.reslora_A.double(), find_layers(model)[1].reslora_A.detach(),
                               rtol=1e-6, atol=1e-7)  # fmt: skip


# ---- Refusals: one sentence, the model as it was


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def rewrite(folder, change):
    """Write the tensors again, changed, as a plain safetensors file."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


DAMAGE = [
    (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "must hold adapter_m",
    ),
    (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "must hold adapter_config"),
    (shutil.rmtree, FileNotFoundError, "must hold"),
    (truncate, ValueError, "adapter_model.safetensors"),
    (flip, ValueError, "adapter_model.safetensors"),
    (lambda f: rewrite(f, lambda t: None), ValueError, "adapter_model.safetensors"),
    (lambda f: change_config(f, peft_type="LORA"), ValueError, "peft_type must be"),
    (lambda f: change_config(f, res_mode="ms"), ValueError, "must agree on res_mode"),
    (lambda f: change_config(f, r=9), ValueError, "must agree on r"),
]


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize(("damage", "kind", "sentence"), DAMAGE)
def test_damaged_files_are_refused(tmp_path, damage, kind, sentence, is_adapted):
    model = adapted()
    save_pretrained(model, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    target = randomize(model) if is_adapted else Net().double()
    before = state_of(target)
    with pytest.raises(kind, match=sentence) as caught:
        load(target, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert_unchanged(target, before)


def test_a_revision_changed_by_hand_is_taken(tmp_path):
    save_pretrained(adapted(), tmp_path)
    change_config(tmp_path, revision="v2")
    model = load(Net().double(), tmp_path)
    save_pretrained(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["revision"] == "v2"


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (lambda: Net(depth=5).double(), "with 5 layers in the model and 4 in the file"),
        (lambda: Net(depth=3).double(), "layers"),
        (lambda: Net(width=8).double(), r"layers.0.lin \(8 -> 8, r 2"),
        (lambda: tiny_llama(), "matches nothing"),
        (lambda: adapted(r=3), "r 3"),
        (lambda: adapted(lora_alpha=5), "scaling 2.5"),
        (lambda: adapted(res_mode="ms"), 'must agree on res_mode; got "ms" and "is"'),
        (lambda: adapted(first_block="plain"), "must agree on first_block"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, target, sentence):
    save_pretrained(adapted(), tmp_path)
    model = target()
    before = state_of(model)
    with pytest.raises(ValueError, match=sentence) as caught:
        load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)


def test_a_head_of_another_shape_is_refused(tmp_path):
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"], "r": 2}
    save_pretrained(inject(tiny_bert(labels=3), ResLoraConfig(**options)), tmp_path)
    model = tiny_bert(labels=4)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"shapes must fit the model; got .*classifier"):
        load(model, tmp_path)
    assert_unchanged(model, before)


def test_saving_refuses_plain_models_and_files(tmp_path):
    with pytest.raises(ValueError, match="model must be adapted"):
        save_pretrained(Net(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        save_pretrained(adapted(), tmp_path / "file")


def test_an_empty_name_is_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(adapted(), "")
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "README.md"}


@pytest.mark.parametrize("write", [save_pretrained, export_lora])
@pytest.mark.parametrize("place", ["front", "end"])
def test_a_card_with_notes_of_the_user_is_kept(tmp_path, write, place):
    model = adapted(res_mode="none", target_modules=["lin"])
    write(model, tmp_path)
    card = tmp_path / "README.md"
    ours = card.read_text()
    write(model, tmp_path)
    assert card.read_text() == ours
    card.write_text(f"My notes\n{ours}" if place == "front" else f"{ours}\nMy notes\n")
    noted = card.read_text()
    write(model, tmp_path)
    assert card.read_text() == noted
