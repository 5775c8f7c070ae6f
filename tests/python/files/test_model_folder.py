"""merge_folder and `reslora merge`: the bits of an in-memory merge, and nothing left on failure."""

import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from models import Net, adapted, tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn

from reslora import _C, calibrate, load, merge_and_unload, refine, save_pretrained
from reslora.commands.cli import main
from reslora.files import model_folder
from reslora.files.model_folder import merge_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_NAME = ("lsq", "projected", "input", "weight", "factored")
RULES = [
    ("none", 1, None, "exact"),
    ("bs", 1, "exact", "exact"),
    ("bs", -1, None, "exact"),
    *[("is", 1, rule, rule) for rule in BY_NAME],
    *[("ms", m, rule, rule) for m in (2, -1) for rule in BY_NAME],
    ("is", 1, None, "lsq"),
    ("ms", 1, None, "lsq"),
]
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "res_mode": "is"}


def batches(count=3):
    return [{"input_ids": tokens(8, 8)} for _ in range(count)]


def train_forwards(model, count=2):
    """Fill the norm windows."""
    model.train()
    for batch in batches(count):
        model(**batch)
    return model.eval()


def make(folder, model=None, statistics=True, fits=False, **options):
    """Write `base` and `adapter` into a folder; return the adapted model."""
    model = tiny_llama(initializer_range=0.2) if model is None else model
    model.save_pretrained(folder / "base")
    adapted(model, 0.2, **LLAMA | options)
    train_forwards(model)
    if fits:
        calibrate(model, batches())
    save_pretrained(model, folder / "adapter", statistics=statistics)
    return model


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def read(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        own = safetensors.torch.load_file(path)
        assert not tensors.keys() & own.keys()
        tensors |= own
    return tensors


def assert_same_bits(got, wanted, names=None):
    for name in got if names is None else names:
        assert got[name].dtype == wanted[name].dtype, name
        assert torch.equal(bits(got[name]), bits(wanted[name])), name


def run(folder, *options, base="base", adapter="adapter", out="out"):
    """`reslora merge` in this process."""
    arguments = [folder / base, folder / adapter, folder / out, *options]
    return main(["merge", *map(str, arguments)])


def assert_only_inputs(folder, *others):
    assert {p.name for p in folder.iterdir()} == {"base", "adapter", *others}


# ---- The bits of merge_and_unload


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("res_mode", "pre_num", "rule", "used"), RULES)
def test_files_merge_as_the_model_does(tmp_path, dtype, res_mode, pre_num, rule, used):
    base = tiny_llama(initializer_range=0.2).to(dtype)
    needs_fits = used == "lsq"
    model = make(tmp_path, base, fits=needs_fits, res_mode=res_mode, pre_num=pre_num)
    before = read(tmp_path / "base")
    report = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rule)
    linked = [r for name, r in report.rules.items() if ".layers.0." not in name]
    assert set(linked) == {used} and len(report.rules) == 9
    got, want = read(tmp_path / "out"), merge_and_unload(model, rule).state_dict()
    assert got.keys() == before.keys() == want.keys()
    assert_same_bits(got, want)
    assert_same_bits(read(tmp_path / "base"), before)
    changed = {name for name in got if not torch.equal(bits(got[name]), bits(before[name]))}
    assert changed == {f"{name}.weight" for name in report.rules}


@pytest.mark.parametrize(("chosen", "used"), [(None, "projected"), ("factored", "factored")])
def test_norms_and_the_config_choose_the_rule(tmp_path, chosen, used):
    model = make(tmp_path, merge_method=chosen)
    report = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert used in report.rules.values() and not report.fell_back_to_weight
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(model).state_dict())


def test_a_plain_shortcut_merges_to_the_sum(tmp_path):
    make(tmp_path, res_mode="none", lora_alpha=3, r=2)
    adapter = _C.load_adapter(tmp_path / "adapter" / "adapter_model.safetensors").tensors
    before = read(tmp_path / "base")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = read(tmp_path / "out")
    names = [key.removesuffix(".reslora_A.weight") for key in adapter if "reslora_A" in key]
    assert len(names) == 9
    for name in names:
        A, B = (adapter[f"{name}.reslora_{f}.weight"].double() for f in "AB")
        want = before[f"{name}.weight"].double() + 1.5 * B @ A
        torch.testing.assert_close(got[f"{name}.weight"].double(), want, rtol=0, atol=1e-6)


def test_larger_matrices_and_ranks_have_the_same_bits(tmp_path):
    sizes = {"hidden_size": 144, "intermediate_size": 272}
    options = {"r": 24, "res_mode": "bs", "pre_num": -1}
    model = make(tmp_path, tiny_llama(**sizes), target_modules="all-linear", **options)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(model).state_dict())


def test_refined_fits_are_used(tmp_path):
    model = make(tmp_path, fits=True)
    refine(model, batches(4), 2)
    save_pretrained(model, tmp_path / "adapter", statistics=True)
    report = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "refined" in report.rules.values()
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(model).state_dict())


def test_affine_fits_change_the_bias(tmp_path):
    model = tiny_bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.bias.normal_()
    make(tmp_path, model, target_modules=["intermediate.dense"])
    calibrate(model, batches(), affine=True)
    save_pretrained(model, tmp_path / "adapter", statistics=True)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(model).state_dict())


@pytest.mark.parametrize("rule", ["lsq", "input", "weight"])
@pytest.mark.parametrize("res_mode", ["is", "ms", "bs"])
def test_conv1d_files_hold_transposed_weights(tmp_path, res_mode, rule):
    targets = ["c_attn", "attn.c_proj", "mlp.c_proj"]  # of which attn.c_proj is square
    rule = None if res_mode == "bs" else rule
    model = make(
        tmp_path, tiny_gpt2(), fits=rule == "lsq", target_modules=targets, res_mode=res_mode
    )
    before = read(tmp_path / "base")
    assert before["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", rule)
    got, want = read(tmp_path / "out"), merge_and_unload(model, rule).state_dict()
    assert got.keys() == before.keys()
    assert_same_bits(got, want)
    assert not torch.equal(*(t["transformer.h.1.attn.c_proj.weight"] for t in (got, before)))


def test_which_files_hold_transposed_weights_is_said_by_the_adapters_own_file(tmp_path):
    model = make(tmp_path, tiny_gpt2(), target_modules=["attn.c_proj"], res_mode="bs")
    values = json.loads((path := tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["fan_in_fan_out"] == ["transformer.h.*.attn.c_proj"]
    path.write_text(json.dumps(values | {"fan_in_fan_out": False}))  # as PEFT writes it
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(model).state_dict())


# ---- Heads


def with_head(folder, base=None, head="classifier", target="query"):
    base = tiny_bert() if base is None else base
    return make(folder, base, target_modules=[target], modules_to_save=[head])


def test_a_trained_head_is_written(tmp_path):
    model = with_head(tmp_path)
    report = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(report.replaced) == ["classifier.bias", "classifier.weight"]
    got = read(tmp_path / "out")
    assert got.keys() == read(tmp_path / "base").keys()
    assert_same_bits(got, merge_and_unload(model).state_dict())


def test_a_head_that_the_base_lacks_is_added(tmp_path):
    model = with_head(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: t for k, t in tensors.items() if "classifier" not in k}, path)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    got = read(tmp_path / "out")
    assert got.keys() == tensors.keys() and {t.dtype for t in got.values()} == {torch.bfloat16}
    assert_same_bits(got, merge_and_unload(model).to(torch.bfloat16).state_dict())


def test_a_head_has_the_dtype_of_the_file(tmp_path):
    with_head(tmp_path)
    base = tiny_bert().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    load(base, tmp_path / "adapter")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(base).state_dict())


# ---- Names


def rename(folder, change):
    path = folder / "model.safetensors"
    tensors = {change(name): t for name, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    "change", [lambda name: name.removeprefix("model."), lambda name: f"outer.{name}"]
)
def test_files_may_have_another_prefix_than_the_model(tmp_path, change):
    model = make(tmp_path)
    rename(tmp_path / "base", change)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    want = {change(name): t for name, t in merge_and_unload(model).state_dict().items()}
    got = read(tmp_path / "out")
    assert got.keys() == want.keys()
    assert_same_bits(got, want)


class Pair(nn.Module):
    """Two stacks whose layers have the same names but for the first part."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Net(), Net()

    def forward(self, x):
        return self.decoder(self.encoder(x))


def save_plain(folder, model):
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")


def test_two_layers_do_not_share_one_tensor_of_the_base(tmp_path):
    save_plain(tmp_path / "base", Net())
    save_pretrained(adapted(Pair(), res_mode="none"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"\[merge\]"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_only_inputs(tmp_path)


def test_a_prefix_that_could_be_either_is_refused(tmp_path):
    save_plain(tmp_path / "base", Pair())
    save_pretrained(adapted(Net(), res_mode="none"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="weight of every adapted layer"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_only_inputs(tmp_path)


# ---- Shards


def make_sharded(folder, **options):
    model = make(folder, **options)
    plain = tiny_llama()
    plain.load_state_dict(read(folder / "base"))
    (folder / "base" / "model.safetensors").unlink()
    plain.save_pretrained(folder / "base", max_shard_size="10KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    return model


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def assert_loads_as(folder, model):
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder)
    want = merge_and_unload(model).state_dict()
    assert merged.state_dict().keys() == want.keys()
    assert_same_bits(merged.state_dict(), want)


def test_shards_are_kept(tmp_path):
    model = make_sharded(tmp_path)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before, after = index_of(tmp_path / "base"), index_of(tmp_path / "out")
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    for name in set(before["weight_map"].values()):
        own = safetensors.torch.load_file(tmp_path / "out" / name)
        assert set(own) == {k for k, v in before["weight_map"].items() if v == name}
    assert_loads_as(tmp_path / "out", model)


@pytest.mark.parametrize("prepare", [make, make_sharded])
def test_the_size_of_shards_can_be_chosen(tmp_path, prepare):
    model = prepare(tmp_path)
    limit = 4000
    assert run(tmp_path, "--shard-size", "4KB") == 0
    weight_map = index_of(tmp_path / "out")["weight_map"]
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    assert count >= 7 and set(weight_map.values()) == set(files)
    for name in files:
        own = safetensors.torch.load_file(tmp_path / "out" / name)
        assert sum(t.nbytes for t in own.values()) <= limit and own.keys() <= weight_map.keys()
    assert_loads_as(tmp_path / "out", model)


def test_shards_can_become_one_file(tmp_path):
    model = make_sharded(tmp_path)
    assert run(tmp_path, "--shard-size", "1GB") == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names and "model.safetensors.index.json" not in names
    assert_loads_as(tmp_path / "out", model)


@pytest.mark.parametrize(
    "names", [["model-00001-of-00001.safetensors"], ["part-1.safetensors", "part-2.safetensors"]]
)
def test_shards_may_have_any_names_and_number(tmp_path, names):
    model = make(tmp_path)
    tensors = read(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    weight_map = {key: names[i % len(names)] for i, key in enumerate(sorted(tensors))}
    for name in names:
        own = {key: t for key, t in tensors.items() if weight_map[key] == name}
        safetensors.torch.save_file(own, tmp_path / "base" / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(tmp_path) == 0
    assert_loads_as(tmp_path / "out", model)


# ---- Dtype and other files


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_sums_are_cast_once(tmp_path, dtype):
    model = make(tmp_path)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "float32"}))
    assert run(tmp_path, "--dtype", dtype) == 0
    want = merge_and_unload(model).to(getattr(torch, dtype)).state_dict()
    assert_same_bits(read(tmp_path / "out"), want)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == dtype


def test_other_files_are_copied(tmp_path):
    make(tmp_path)
    base = tmp_path / "base"
    (base / "tokenizer.json").write_bytes(b'{"a": "\xc3\xa9"}')
    (base / "LICENSE").write_text("free")
    (base / "chat").mkdir()
    (base / "chat" / "template.jinja").write_text("{{ x }}")
    for name in ("pytorch_model.bin", "other.safetensors", "flax_model.msgpack"):
        (base / name).write_bytes(b"old weights")
    merge_folder(base, tmp_path / "adapter", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "LICENSE", "chat", "config.json", "generation_config.json",
                     "model.safetensors"}  # fmt: skip
    for name in ("tokenizer.json", "LICENSE", "chat/template.jinja", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_weights_in_subfolders_are_not_copied(tmp_path):
    make(tmp_path)
    (tmp_path / "base" / "original").mkdir()
    (tmp_path / "base" / "original" / "consolidated.00.pth").write_bytes(b"unmerged")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.pth"))


# ---- Refusals: one sentence, nothing left


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def change_layer(name, change):
    def write(folder):
        change_tensors(
            folder / "base", lambda tensors: change(tensors, f"model.layers.{name}.weight")
        )

    return write


def quantise(dtype):
    return change_layer("1.self_attn.v_proj", lambda t, k: t.update({k: t[k].to(dtype)}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def other_base(make_model):
    return lambda folder: make_model().save_pretrained(folder / "base")


def index(text):
    return lambda folder: (folder / "base" / "model.safetensors.index.json").write_text(text)


BAD = [
    (other_base(tiny_bert), "is this the base of the adapter"),
    (other_base(lambda: tiny_llama(hidden_size=24)), r"the base must fit the adapter; got \["),
    (change_layer("2.mlp.down_proj", lambda t, k: t.pop(k)), "none for model.layers.2.mlp"),
    (other_base(lambda: tiny_llama(layers=2)), "none for model.layers.2"),
    (quantise(torch.int8), "unquantised"),
    (quantise(torch.uint8), "unquantised"),
    (quantise(torch.float8_e4m3fn), "unquantised"),
    (lambda f: truncate(f / "base" / "model.safetensors"), "model.safetensors"),
    (lambda f: (f / "base" / "model.safetensors").write_bytes(b""), "model.safetensors"),
    (lambda f: (f / "base" / "model.safetensors").unlink(), "must hold model.safetensors"),
    (lambda f: shutil.rmtree(f / "base"), "BASE must be a folder"),
    (lambda f: truncate(f / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors"),
    (lambda f: truncate(f / "adapter" / "adapter_statistics.safetensors"), "adapter_statistics"),
    (lambda f: (f / "adapter" / "adapter_config.json").unlink(), "adapter_config.json"),
    (index("{"), "index whose weight_map"),
    (index("[]"), "index whose weight_map"),
    (index('{"weight_map": {"a": 1}}'), "index"),
    (index('{"weight_map": {}}'), "index"),
    (index('{"weight_map": {"a": "model-1.safetensors"}}'), "got no model-1.safetensors"),
    (index('{"weight_map": {"a": "../adapter/adapter_model.safetensors"}}'), "beside it"),
]


@pytest.mark.parametrize(("damage", "sentence"), BAD)
def test_bad_files_are_refused(tmp_path, capsys, damage, sentence):
    make(tmp_path)
    damage(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        merge_folder(f"{tmp_path}/base", tmp_path / "adapter", tmp_path / "out")
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    assert run(tmp_path) == 1
    assert capsys.readouterr().err == f"reslora: {caught.value}\n"
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "damage",
    [truncate, os.unlink, lambda p: shutil.copyfile(p.parent / p.name.replace("2", "1", 1), p)],
)
def test_damaged_shards_are_refused(tmp_path, damage):
    make_sharded(tmp_path)
    damage(tmp_path / "base" / "model-00002-of-00004.safetensors")
    with pytest.raises((ValueError, OSError), match="model-00002-of-00004") as caught:
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert_only_inputs(tmp_path)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("file", "OUT must be a folder to make"),
        ("base", "OUT must be a folder to make"),
        ("adapter", "OUT must be a folder to make"),
        ("no/out", "the folder of OUT must exist"),
    ],
)
def test_places_that_are_taken_are_refused(tmp_path, out, sentence):
    make(tmp_path)
    (tmp_path / "file").write_text("mine")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=sentence):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / out)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_taken(tmp_path, monkeypatch):
    make(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "base", "adapter", "out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert_only_inputs(tmp_path, "out")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"merge_method": "exact"}, "rule 'exact' serves"),
        ({"merge_method": "lsq"}, "rule 'lsq' needs a fit"),
        ({"merge_method": "best"}, "merge_method must be"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"device": "nonsense"}, "device"),
    ],
)
def test_options_that_cannot_serve_are_refused(tmp_path, options, sentence):
    make(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=sentence) as caught:
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert_only_inputs(tmp_path)


# ---- Failures half way


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    make(tmp_path)
    others = [p for p in (tmp_path / "base").iterdir() if p.suffix != ".safetensors"]
    tensors = read(tmp_path / "base").values()
    needed = sum(t.nbytes for t in tensors) + sum(p.stat().st_size for p in others)
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match="MB free"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    free.free = needed
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "more")


@pytest.fixture
def small_files():
    """Let no file grow beyond 20 KB; the merged model has 33."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, small_files):
    make(tmp_path)
    small_files()
    capsys.readouterr()
    assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert "File too large" in error and error.count("\n") == 1
    assert_only_inputs(tmp_path)


def test_a_write_that_fails_is_an_error_of_the_system(tmp_path, small_files):
    make(tmp_path)
    small_files()
    with pytest.raises(OSError, match="File too large"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_second_shard_that_fails_leaves_nothing(tmp_path, monkeypatch):
    make_sharded(tmp_path)
    write, calls = _C.ModelFiles.write, []

    def failing(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            assert (tmp_path / ".out.unfinished").is_dir() and os.path.exists(calls[0])
            raise OSError("No space left on device")
        write(*arguments)

    monkeypatch.setattr(_C.ModelFiles, "write", failing)
    with pytest.raises(OSError, match="No space"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert_only_inputs(tmp_path)


def test_leftovers_of_a_killed_merge_are_removed(tmp_path):
    model = make(tmp_path)
    left = tmp_path / ".out.unfinished"
    (left / "folder").mkdir(parents=True)
    for name in (".writer", "folder/file", "model-00001-of-00009.safetensors", "config.json"):
        (left / name).write_bytes(b"half")
    assert run(tmp_path) == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in (tmp_path / "base").iterdir()}
    assert_only_inputs(tmp_path, "out")
    assert_same_bits(read(tmp_path / "out"), merge_and_unload(model).state_dict())
