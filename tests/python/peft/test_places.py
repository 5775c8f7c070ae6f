"""One module object at several places: adapted at each, once in files, right after merging."""

import copy
import warnings

import pytest
import torch
from models import Block, randomize
from torch import nn

import reslora
from reslora import _C
from reslora.files.exporting import export_folder
from reslora.files.model_folder import merge_folder
from reslora.injection.adapted import find_layers, injection_of

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft import PeftModel, get_peft_model  # noqa: E402

from reslora.peft import PeftLinear, ResLoraConfig  # noqa: E402


class Twice(nn.Module):
    """A linear layer that hangs at two places, between others."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.first, self.entry = shared, nn.Linear(4, 4)
        self.rest = nn.ModuleList([nn.Linear(4, 4), shared])

    def forward(self, x):
        for layer in (self.entry, self.first, *self.rest):
            x = torch.tanh(layer(x))
        return x


def with_a_block_twice():
    block = Block(4)
    return nn.Sequential(block, Block(4), block)


MODELS = [(Twice, ["first", "entry"]), (with_a_block_twice, ["lin"])]


def made(make, targets, res_mode):
    """The base, its adapted twins by PEFT and in the core with the same adapters."""
    torch.manual_seed(0)
    base = make()
    options = {"r": 2, "target_modules": targets, "res_mode": res_mode}
    model = randomize(get_peft_model(copy.deepcopy(base), ResLoraConfig(**options))).eval()
    return base, model


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(("make", "targets"), MODELS)
@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_a_module_at_two_places_is_the_same_in_both(tmp_path, make, targets, res_mode):
    base, model = made(make, targets, res_mode)
    x = torch.randn(3, 4)
    wanted = model(x)
    model.save_pretrained(tmp_path)
    core = reslora.load(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(core(x), wanted, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(read(x), wanted, rtol=0, atol=0)
    reslora.save_pretrained(core, tmp_path / "core")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "core").eval()
    torch.testing.assert_close(again(x), wanted, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(("make", "targets"), MODELS)
@pytest.mark.parametrize("res_mode", ["none", "bs"])
def test_a_module_at_two_places_is_merged_and_unloaded(make, targets, res_mode):
    base, model = made(make, targets, res_mode)
    x = torch.randn(3, 4)
    wanted = model(x)
    plain = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-6)
    plain = model.unload()
    torch.testing.assert_close(plain(x), base.eval()(x), rtol=0, atol=0)
    for left in (plain, copy.deepcopy(plain)):
        kinds = [type(child) for parent in left.modules() for child in parent._modules.values()]
        assert PeftLinear not in kinds
    if make is Twice:
        assert plain.first is plain.rest[1]


class Gated(nn.Module):
    """Its keys and values are one module; all blocks share their output."""

    def __init__(self, out):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.v, self.out = self.k, out

    def forward(self, x):
        return x + torch.tanh(self.out(self.q(x) * torch.tanh(self.k(x)) + self.v(x)))


def gated():
    out = nn.Linear(4, 4)
    return nn.Sequential(*(Gated(out) for _ in range(3)))


def several_rows(model, x):
    """Return what each layer's call saw, in order, and what entered its B."""
    seen = {layer.name: [] for layer in find_layers(model)}
    for layer in find_layers(model):
        layer.observer = lambda x, s, y, name=layer.name: seen[name].append((x.clone(), s.clone()))
    with torch.no_grad():
        model(x)
    for layer in find_layers(model):
        layer.observer = None
    return seen


@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_a_module_that_reads_one_tensor_several_times_is_fitted_on_every_call(res_mode):
    """Its k and v are called twice with x, which q reads too: another partner than once."""
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["q", "k", "out"], "res_mode": res_mode}
    model = randomize(get_peft_model(gated(), ResLoraConfig(**options))).double().eval()
    x = torch.randn(50, 4, dtype=torch.float64)
    seen = several_rows(model, x)
    assert [len(seen[f"1.{name}"]) for name in ("q", "k")] == [1, 2]
    result = reslora.calibrate(model, [x], ridge=1e-9, move_taps=False)
    fits = injection_of(model, "test").calibrated.fits
    for layer in find_layers(model):
        if layer.name not in fits:
            continue
        rows, wanted = (torch.cat(parts) for parts in zip(*seen[layer.name], strict=True))
        solved = torch.linalg.lstsq(rows, wanted).solution.T
        torch.testing.assert_close(fits[layer.name].A.double(), solved, rtol=1e-5, atol=1e-6)
        assert fits[layer.name].rows == len(rows)
    assert result.passes == 2 and len(fits) == 4
    assert reslora.merge(model).rule == "lsq"
    with pytest.raises(ValueError, match=r"more than one pass .* several places.* read once"):
        reslora.unmerge(model)
        reslora.calibrate(model, iter([x]))


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(("make", "targets"), MODELS)
def test_files_name_all_places_and_are_merged_there(tmp_path, make, targets):
    base, model = made(make, targets, "bs")
    model.save_pretrained(tmp_path / "plugin")
    core = reslora.load(copy.deepcopy(base), tmp_path / "plugin").eval()
    reslora.save_pretrained(core, tmp_path / "core")
    (tmp_path / "base").mkdir()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    kept = {"first.weight": "rest.1.weight", "0.lin.weight": "2.lin.weight"}
    for missing in ([], kept.keys(), kept.values()):  # files may hold any of them
        held = {key: tensor for key, tensor in state.items() if key not in missing}
        _C.save_tensors(tmp_path / "base/model.safetensors", held, {})
        for adapter in ("plugin", "core"):
            out = tmp_path / f"{adapter} without {len(missing)} {next(iter(missing), '')}"
            merge_folder(tmp_path / "base", tmp_path / adapter, out)
            merged = _C.load_tensors(out / "model.safetensors")[0]
            for key, tensor in reslora.merge_and_unload(copy.deepcopy(core)).state_dict().items():
                assert key in missing or torch.equal(merged[key], tensor), key
    for adapter in ("plugin", "core"):
        for more in ({}, {"base": tmp_path / "base"}):
            with pytest.raises(
                ValueError, match=r"must hang at one place.* too: merge into the base"
            ):
                export_folder(tmp_path / adapter, tmp_path / "lora", **more)
    assert not (tmp_path / "lora").exists()


class Tied(nn.Module):
    """Two modules with one weight, of which one is adapted."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_a_weight_of_two_modules_is_merged_neither_in_memory_nor_in_files(tmp_path):
    base, model = made(Tied, ["encoder"], "none")
    model.save_pretrained(tmp_path / "plugin")
    core = reslora.load(copy.deepcopy(base), tmp_path / "plugin").eval()
    reslora.save_pretrained(core, tmp_path / "core")
    (tmp_path / "base").mkdir()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    _C.save_tensors(tmp_path / "base/model.safetensors", state, {})
    for adapter in ("plugin", "core"):
        with pytest.raises(ValueError, match=r"must be their own; got those of encoder"):
            merge_folder(tmp_path / "base", tmp_path / adapter, tmp_path / "out")
        export_folder(tmp_path / adapter, tmp_path / f"lora of {adapter}")
    for adapted in (core, model):
        with pytest.raises(ValueError, match=r"must belong to one layer; got that of encoder"):
            reslora.merge(adapted)


def transposed(base):
    base.decoder = nn.Linear(4, 4)
    base.decoder.weight.data = base.encoder.weight.data.T


def part_of_a_buffer(base):
    base.decoder = nn.Linear(4, 4)
    base.decoder.register_buffer("rows", base.encoder.weight.data[1:3])


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(
    ("tie", "target", "other"),
    [
        (transposed, "encoder", "decoder.weight"),
        (transposed, "decoder", "encoder.weight"),
        (part_of_a_buffer, "encoder", "decoder.rows"),
    ],
)
def test_memory_that_modules_share_counts_whatever_tensors_lie_in_it(tmp_path, tie, target, other):
    base = Tied()
    tie(base)
    options = {"r": 2, "target_modules": [target], "res_mode": "none"}
    core = randomize(reslora.inject(base, reslora.ResLoraConfig(**options)))
    reslora.save_pretrained(core, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    state = {key: tensor.clone() for key, tensor in Tied().state_dict().items()}
    _C.save_tensors(tmp_path / "base/model.safetensors", state, {})
    with pytest.raises(ValueError, match=rf"got those of {target}, where {other} is the same"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match=rf"got that of {target}, which is {other} too"):
        reslora.merge(core)


def test_layers_that_are_parts_of_one_tensor_are_not_tied():
    base, both = Tied(), torch.randn(8, 4)
    base.decoder = nn.Linear(4, 4)
    base.encoder.weight.data, base.decoder.weight.data = both[:4], both[4:]
    options = {"r": 2, "target_modules": ["encoder", "decoder"], "res_mode": "none"}
    core = randomize(reslora.inject(base, reslora.ResLoraConfig(**options))).eval()
    x = torch.randn(3, 4)
    wanted = core(x)
    torch.testing.assert_close(reslora.merge_and_unload(core)(x), wanted, rtol=1e-5, atol=1e-6)


class Headed(nn.Module):
    """A layer, a module that is trained whole, and something that shares it."""

    def __init__(self, head, other):
        super().__init__()
        self.lin, self.head, self.other = nn.Linear(4, 4), head, other
        if other is not head:
            other.weight = head.weight

    def forward(self, x):
        return self.head(torch.tanh(self.lin(x)))


def an_embedding():
    return nn.Embedding(4, 4)


def a_linear():
    return nn.Linear(4, 4)


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
@pytest.mark.parametrize(
    ("make", "make_other", "name"),
    [
        (a_linear, None, "head"),  # one object at two places
        (a_linear, a_linear, "head"),
        (a_linear, a_linear, "other"),
        (an_embedding, None, "head"),
        (an_embedding, an_embedding, "head"),  # T5's encoder and decoder have one of their own
    ],
)
def test_a_trained_copy_of_a_module_at_two_places_is_not_merged_in_files(
    tmp_path, make, make_other, name
):
    head = make()
    base = Headed(head, make_other() if make_other else head)
    options = {"r": 2, "target_modules": ["lin"], "res_mode": "none", "modules_to_save": [name]}
    model = randomize(get_peft_model(copy.deepcopy(base), ResLoraConfig(**options)))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    _C.save_tensors(tmp_path / "base/model.safetensors", state, {})
    shared = "other" if name == "head" else "head"
    with pytest.raises(ValueError, match=rf"got those of {name}, where {shared}\.weight is the"):
        merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.eval()
    if make is a_linear:  # in memory a copy is a copy
        x = torch.randn(3, 4)
        wanted = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_an_embedding_and_its_head_are_told_by_what_the_files_hold(tmp_path):
    base = Headed(a_linear(), an_embedding())
    options = {"r": 2, "target_modules": ["lin"], "res_mode": "none", "modules_to_save": ["head"]}
    model = randomize(get_peft_model(copy.deepcopy(base), ResLoraConfig(**options)))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    _C.save_tensors(tmp_path / "base/model.safetensors", state, {})
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = _C.load_tensors(tmp_path / "out/model.safetensors")[0]
    assert torch.equal(merged["head.weight"], model.merge_and_unload().head.weight)
    assert torch.equal(merged["other.weight"], state["other.weight"])


@pytest.mark.parametrize("targets", [["entry", "rest.1"], ["entry", "1"], r".*(entry|rest\.1)"])
def test_a_target_that_is_a_second_name_is_refused(targets):
    options = {"r": 2, "target_modules": targets, "res_mode": "none"}
    model = Twice()
    with pytest.raises(ValueError, match=r"got rest\.1, which is first too \(name first in"):
        get_peft_model(model, ResLoraConfig(**options))
    assert not any(isinstance(module, PeftLinear) for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_a_second_adapter_is_refused_a_second_name_too():
    options = {"r": 2, "res_mode": "none"}
    model = get_peft_model(Twice(), ResLoraConfig(target_modules=["first", "entry"], **options))
    with pytest.raises(ValueError, match=r"got rest\.1, which is first too"):
        model.add_adapter("b", ResLoraConfig(target_modules=["entry", "rest.1"], **options))


class Classifier(nn.Module):
    """A head that the body holds too; which name comes first is asked for."""

    def __init__(self, is_head_first):
        super().__init__()
        head = nn.Sequential()
        head.dense = nn.Linear(4, 4)
        if is_head_first:
            self.classifier = head
        self.body = nn.Module()
        self.body.q, self.body.cls = nn.Linear(4, 4), head
        self.classifier = head

    def forward(self, x):
        return self.classifier(self.body.q(x))


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_what_is_excluded_or_trained_whole_by_its_first_name_is_left():
    options = {"r": 2, "res_mode": "none"}
    left = ResLoraConfig(target_modules=["1", "entry"], exclude_modules=["first"], **options)
    model = get_peft_model(Twice(), left)
    assert [n for n, x in model.named_modules() if isinstance(x, PeftLinear)] == [
        "base_model.model.entry"
    ]
    whole = ResLoraConfig(target_modules=["dense", "q"], modules_to_save=["classifier"], **options)
    model = get_peft_model(Classifier(is_head_first=True), whole)
    assert len([x for x in model.modules() if isinstance(x, PeftLinear)]) == 1


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_a_target_that_is_trained_whole_by_another_name_is_refused_and_nothing_is_left():
    base = Classifier(is_head_first=False)
    config = ResLoraConfig(
        r=2, res_mode="none", target_modules=["dense", "q"], modules_to_save=["classifier"]
    )
    with pytest.raises(ValueError, match=r"got body\.cls\.dense as a target, which is classifier"):
        get_peft_model(base, config)
    assert set(base.state_dict()) == set(Classifier(is_head_first=False).state_dict())


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_a_file_names_the_ties_of_its_own_heads(tmp_path):
    base = Headed(a_linear(), a_linear())
    options = {"r": 2, "target_modules": ["lin"], "res_mode": "none"}
    model = get_peft_model(base, ResLoraConfig(modules_to_save=["head"], **options))
    model.add_adapter("plain", ResLoraConfig(**options))
    model.save_pretrained(tmp_path)
    for place, wanted in ((tmp_path, {"head": ["other.weight"]}), (tmp_path / "plain", None)):
        assert ResLoraConfig.from_pretrained(place).tied_weights == wanted


@pytest.mark.filterwarnings("ignore:.*no two adapted layers are linked")
def test_a_plain_lora_of_a_layer_at_two_places_is_refused(tmp_path):
    convert_to_lora = pytest.importorskip("peft", minversion="0.19").convert_to_lora
    base, model = made(Twice, ["first", "entry"], "bs")
    model.save_pretrained(tmp_path / "adapter")
    core = reslora.load(copy.deepcopy(base), tmp_path / "adapter")
    for adapted in (core, model):
        with pytest.raises(ValueError, match=r"adapts one place .* first, which hangs at 2 places"):
            reslora.export_lora(adapted, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    base, model = made(with_a_block_twice, ["lin"], "bs")  # one place, in a block that has two
    reslora.export_lora(model, tmp_path / "block")
    x = torch.randn(3, 4)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "block").eval()
    torch.testing.assert_close(lora(x), model(x), rtol=1e-5, atol=1e-6)
