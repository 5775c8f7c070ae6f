"""What PEFT reads is checked as `reslora.load` checks it, and what it saves is one event."""

import copy
import json
import random
import warnings

import pytest
import safetensors.torch
import torch
from models import randomize, tiny_llama, tokens

import reslora
from reslora.injection.adapted import find_layers

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft_models import TARGETS, logits, wrapped  # noqa: E402

from reslora.peft import ResLoraConfig, hooks  # noqa: E402

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = tokens()


def base_of(seed=0):
    torch.manual_seed(seed)
    return tiny_llama(2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    wrapped(base_of(), target_modules=["q_proj"]).save_pretrained(folder)
    return folder


def copied(saved, tmp_path):
    """The folder again, for a test that changes it."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def changed(folder, **options):
    values = json.loads((folder / CONFIG).read_text()) | options
    (folder / CONFIG).write_text(json.dumps(values))


def by_peft(folder):
    return peft.PeftModel.from_pretrained(base_of(), folder)


def over_another(folder):
    """As Trainer resumes: into the adapter that is there."""
    model = wrapped(base_of(), target_modules=["q_proj"])
    model.load_adapter(folder, "default")
    return model


def as_second(folder):
    model = wrapped(base_of(), target_modules=["q_proj"])
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def by_transformers(folder):
    model = base_of()
    model.load_adapter(str(folder))
    return model


READERS = [by_peft, over_another, as_second, by_transformers]


@pytest.mark.parametrize("read", READERS)
def test_an_adapter_that_is_whole_is_read_without_a_word(saved, read):
    wanted = logits(reslora.load(base_of(), saved), IDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[")
        model = read(saved)
    torch.testing.assert_close(logits(model.eval(), IDS), wanted, rtol=0, atol=0)


def flips(saved, number):
    """Bits of the weights file, by a seed."""
    size = 8 * (saved / WEIGHTS).stat().st_size
    return random.Random(7).sample(range(size), number)


def check_flip(saved, tmp_path, bit, read):
    folder = copied(saved, tmp_path)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / WEIGHTS).write_bytes(content)
    try:
        model = read(folder)
    except (ValueError, RuntimeError, OSError, safetensors.SafetensorError):
        return
    # Of the version that wrote the file, which has no meaning for what it holds.
    wanted = logits(reslora.load(base_of(), saved), IDS)
    torch.testing.assert_close(logits(model.eval(), IDS), wanted, rtol=0, atol=0)
    header = 8 + int.from_bytes(content[:8], "little")
    assert bit // 8 < header, "a flipped bit of a tensor was taken"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("place", range(6))
def test_a_flipped_bit_is_refused_or_means_nothing(saved, tmp_path, place, read):
    check_flip(saved, tmp_path, flips(saved, 6)[place], read)


@pytest.mark.full
@pytest.mark.parametrize("place", range(150))
def test_every_flipped_bit_is_refused_or_means_nothing(saved, tmp_path, place):
    check_flip(saved, tmp_path, flips(saved, 150)[place], by_peft)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_alpha", 60.0), ("res_mode", "is"), ("r", 2), ("pre_num", 2), ("use_rslora", True)],
)
def test_options_that_were_changed_in_the_file_are_refused(saved, tmp_path, read, name, value):
    folder = copied(saved, tmp_path)
    changed(folder, **{name: value})
    with pytest.raises(ValueError, match=f"must agree on {name}"):
        read(folder)


@pytest.mark.parametrize("read", [by_peft, as_second, by_transformers])
def test_targets_that_were_changed_in_memory_are_refused(saved, read, monkeypatch):
    made = ResLoraConfig.__init__
    monkeypatch.setattr(
        ResLoraConfig, "__init__",
        lambda self, **own: made(self, **own | {"target_modules": ["v_proj"]}),
    )  # fmt: skip
    with pytest.raises(ValueError, match="first difference"):
        read(saved)


@pytest.mark.parametrize("read", READERS)
def test_a_file_without_a_header_is_taken_with_one_warning(saved, tmp_path, read):
    folder = copied(saved, tmp_path)
    wanted = logits(by_peft(saved).eval(), IDS)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="metadata has no"):  # it is known that there was one
        read(folder)
    values = json.loads((folder / CONFIG).read_text())
    del values["reslora_sum"]
    (folder / CONFIG).write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=f"{WEIGHTS} has no header of reslora") as caught:
        model = read(folder)
    assert len([own for own in caught if "has no header" in str(own.message)]) == 1
    torch.testing.assert_close(logits(model.eval(), IDS), wanted, rtol=0, atol=0)


def test_what_transformers_saves_is_read_with_one_warning(tmp_path):
    model = base_of()
    model.add_adapter(ResLoraConfig(r=4, target_modules=TARGETS, res_mode="is"))
    randomize(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no header of reslora"):
        again = by_transformers(tmp_path)
    torch.testing.assert_close(logits(again.eval(), IDS), logits(model.eval(), IDS))
    # Saved anew, over files of another rank and after a load of files that had a header.
    other = base_of()
    other.add_adapter(ResLoraConfig(r=2, target_modules=TARGETS, res_mode="bs"))
    randomize(other)
    other.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no header of reslora"):
        again = by_transformers(tmp_path)
    torch.testing.assert_close(logits(again.eval(), IDS), logits(other.eval(), IDS))


def test_what_transformers_saves_of_a_loaded_adapter_claims_no_header(saved, tmp_path):
    by_transformers(saved).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text()).get("reslora_sum") is None
    with pytest.warns(UserWarning, match="has no header of reslora"):
        by_transformers(tmp_path)


@pytest.mark.parametrize("way", ["get", "add", "transformers", "copy", "another base"])
def test_a_config_of_a_folder_may_train_another_adapter(saved, tmp_path, way):
    folder = copied(saved, tmp_path)
    config = peft.PeftConfig.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(b"damaged")
    config.inference_mode, config.lora_alpha, config.res_mode = False, 99.0, "bs"
    if way == "copy":
        config = copy.deepcopy(config)
    model = tiny_llama(4) if way == "another base" else base_of()
    if way == "transformers":
        model.add_adapter(config)
    elif way == "add":
        model = wrapped(model, target_modules=["q_proj"])
        model.add_adapter("other", config)
        model.set_adapter("other")
    else:
        model = peft.get_peft_model(model, config)
    assert not any(layer.reslora_B.any() for layer in find_layers(model))


def test_a_loaded_config_may_train_another_adapter(saved):
    for read in (by_peft, by_transformers):
        config = copy.deepcopy(read(saved).peft_config["default"])
        config.inference_mode, config.r = False, 7
        model = peft.get_peft_model(tiny_llama(4), config)
        assert {layer.r for layer in find_layers(model)} == {7}


@pytest.mark.parametrize("read", [by_peft, over_another, as_second])  # transformers reads none
def test_a_pickled_file_is_taken_with_one_warning(saved, tmp_path, read):
    folder = copied(saved, tmp_path)
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="bin has no header of reslora") as caught:
        read(folder)
    assert len([own for own in caught if "has no header" in str(own.message)]) == 1


def test_options_given_to_transformers_are_checked(saved):
    given = ResLoraConfig(r=4, lora_alpha=60, target_modules=["q_proj"], res_mode="ms")
    with pytest.raises(ValueError, match=r"must agree on lora_alpha|first difference"):
        base_of().load_adapter(str(saved), peft_config=given)


def test_a_plain_lora_is_not_loaded_over_an_adapter(tmp_path):
    lora = peft.get_peft_model(base_of(), peft.LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be one of reslora; got LORA"):
        over_another(tmp_path)


@pytest.mark.parametrize("read", READERS)
def test_options_that_claim_another_method_are_refused(saved, tmp_path, read):
    changed(copied(saved, tmp_path), peft_type="LORA")
    with pytest.raises(ValueError, match=r"adapter (must be one )?of reslora; got .*LORA"):
        read(tmp_path)


def test_a_folder_of_another_adapter_is_loaded_over_one_that_was_loaded(saved, tmp_path):
    other = wrapped(base_of(), target_modules=["q_proj"])
    randomize(other)
    other.save_pretrained(tmp_path)
    model = by_peft(saved)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model.eval(), IDS), logits(other.eval(), IDS))


def test_a_save_between_options_and_weights_is_read_again(saved, tmp_path, monkeypatch):
    folder = copied(saved, tmp_path)
    other = wrapped(base_of(), target_modules=["q_proj"], lora_alpha=60)
    read, calls = peft.PeftConfig.from_json_file.__func__, []

    def earlier(cls, path, **kwargs):
        values = read(cls, path, **kwargs)
        calls.append(path)
        if len(calls) == 2:  # the first call asks for the type alone
            other.save_pretrained(folder)
        return values

    monkeypatch.setattr(peft.PeftConfig, "from_json_file", classmethod(earlier))
    model = by_peft(folder)
    assert model.peft_config["default"].lora_alpha == 60 and len(calls) == 3
    torch.testing.assert_close(logits(model.eval(), IDS), logits(other.eval(), IDS))


def test_a_save_while_peft_reads_is_noticed(saved, tmp_path, monkeypatch):
    folder = copied(saved, tmp_path)
    other = wrapped(base_of(), target_modules=["q_proj"], lora_alpha=60)
    load = peft.peft_model.load_peft_weights

    def later(*args, **kwargs):
        other.save_pretrained(folder)
        return load(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", later)
    with pytest.raises(RuntimeError, match="was written meanwhile"):
        by_peft(folder)


def test_a_load_that_failed_is_checked_again(saved, tmp_path, monkeypatch):
    folder = copied(saved, tmp_path)
    model = wrapped(base_of(), target_modules=["q_proj"])

    def full(*args, **kwargs):
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(peft.peft_model, "load_peft_weights", full)
        with pytest.raises(OSError, match="no memory"):
            model.load_adapter(folder, "default")
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        model.load_adapter(folder, "default")


@pytest.mark.parametrize("read", READERS)
def test_statistics_are_read_with_the_adapter(tmp_path, read):
    model = wrapped(base_of(), target_modules=["q_proj"]).train()
    model(input_ids=IDS)
    reslora.save_pretrained(model, tmp_path, statistics=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"\[")
        loaded = read(tmp_path)
    for own, other in zip(find_layers(loaded), find_layers(model), strict=True):
        assert torch.equal(own.norms, other.norms)
    assert reslora.merge(loaded).rule == "projected"
    reslora.unmerge(loaded)
    (tmp_path / "adapter_statistics.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="load_statistics"):
        read(tmp_path)


# ---- Saving


def test_adapters_by_other_names_have_folders_of_their_own(tmp_path):
    model = wrapped(base_of(), "first", target_modules=["q_proj"])
    model.add_adapter("second", ResLoraConfig(r=2, target_modules=["v_proj"], res_mode="bs"))
    model.save_pretrained(tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == [
        "README.md", "first", f"first/{CONFIG}", f"first/{WEIGHTS}",
        "second", f"second/{CONFIG}", f"second/{WEIGHTS}",
    ]  # fmt: skip
    for name in ("first", "second"):
        model.set_adapter(name)
        read = reslora.load(base_of(), tmp_path / name)
        torch.testing.assert_close(logits(read, IDS), logits(model, IDS))


def test_a_card_of_somebody_else_is_updated_as_peft_does(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nA sentence.\n")
    (tmp_path / "notes.txt").write_text("mine")
    wrapped(base_of()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "A sentence." in card and "license: mit" in card and "How to load" in card
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("failing", ["safe_save_file", "get_peft_model_state_dict"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(saved, tmp_path, failing, monkeypatch):
    folder = copied(saved, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(peft.peft_model, failing, full)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            wrapped(base_of(), r=2).save_pretrained(place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pickles_are_refused_and_a_file_in_the_way_is(tmp_path):
    model = wrapped(base_of())
    with pytest.raises(ValueError, match="got safe_serialization=False"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not (tmp_path / "adapter").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "adapter", selected_adapters=["none"])
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("read", [by_peft, by_transformers])
def test_options_that_are_nested_too_deep_are_refused(saved, tmp_path, read):
    (copied(saved, tmp_path) / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested"):
        read(tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    wrapped(base_of()).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not list((tmp_path / "adapter").iterdir())


def test_other_methods_are_saved_and_loaded_as_before(tmp_path):
    model = peft.get_peft_model(base_of(), peft.LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    read = peft.PeftModel.from_pretrained(base_of(), tmp_path)
    torch.testing.assert_close(logits(read, IDS), logits(model.eval(), IDS))
    before = peft.PeftModel.save_pretrained
    hooks.add_to_peft()  # a second time
    assert peft.PeftModel.save_pretrained is before


def test_a_copy_of_a_config_is_free_of_the_folder(saved):
    model = by_peft(saved)
    config = copy.deepcopy(model.peft_config["default"])
    assert "source" not in config.to_dict()
    assert hooks.source_of(config) is None
