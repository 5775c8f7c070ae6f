"""ResLoraLinear: the literal formulas, gradients, dtypes, statistics, base layers."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from models import (
    SHORTCUTS,
    Block,
    Net,
    adapted,
    gradients,
    literal,
    randomize,
    tiny_gpt2,
    tiny_llama,
    tokens,
    trained,
)
from torch import nn

import reslora
from reslora import ResLoraConfig, inject
from reslora.nn import ops

DOUBLE = {"dtype": torch.float64}


# ---- The formulas


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
@pytest.mark.filterwarnings("ignore:.*no two adapted layers")
def test_an_adapted_model_computes_the_literal_formulas(res_mode, pre_num, depth):
    model = adapted(Net(depth=depth).double(), res_mode=res_mode, pre_num=pre_num)
    x = torch.randn(2, 3, 6, **DOUBLE)
    want = literal(model, x, res_mode, pre_num)
    got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    parameters = trained(model)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(want.square().sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 1, 3, 6)])
def test_any_number_of_leading_dimensions(shape):
    for res_mode, pre_num in SHORTCUTS:
        model = adapted(Net(bias=False).double(), res_mode=res_mode, pre_num=pre_num)
        x = torch.randn(shape, **DOUBLE)
        want = literal(model, x, res_mode, pre_num)
        torch.testing.assert_close(model(x), want, rtol=1e-11, atol=1e-12)


def test_a_plain_first_block():
    model = adapted(first_block="plain")
    x = torch.randn(3, 6, **DOUBLE)
    torch.testing.assert_close(model(x), literal(model, x, "is", 1, "plain"))
    assert not torch.allclose(model(x), literal(model, x, "is", 1))


def test_detached_taps_keep_values_and_cut_gradients():
    x = torch.randn(3, 6, **DOUBLE)
    model = adapted(Net(depth=2).double(), res_mode="ms")
    torch.manual_seed(1)
    control = adapted(Net(depth=2).double(), res_mode="ms", detach_taps=True)
    control.load_state_dict(model.state_dict())
    assert torch.equal(control(x), model(x))
    with torch.no_grad():  # the tap is then the one way from the first adapter to the output
        for m in (model, control):
            m.layers[0].lin.reslora_B.zero_()
    name = "layers.0.lin.reslora_A"
    for m, has_gradient in ((model, True), (control, False)):
        m(x).square().sum().backward()
        gradient = m.get_parameter(name).grad
        assert (gradient is not None and bool(gradient.any())) is has_gradient


def test_ranks_and_scalings_may_differ_from_layer_to_layer():
    for res_mode in ("is", "bs"):
        model = adapted(
            res_mode=res_mode, r=3, rank_pattern={r"layers\.1\..*": 1, r"layers\.2\..*": 9},
            alpha_pattern={r"layers\.0\..*": 7}, use_rslora=True,
        )  # fmt: skip
        blocks, xs, x = [], [], torch.randn(3, 6, **DOUBLE)
        got = model(x)
        for n, layer in enumerate(block.lin for block in model.layers):
            scaling = (7 if n == 0 else 3) / math.sqrt(layer.r)
            base = layer.base_layer
            factors = (layer.reslora_A, layer.reslora_B)
            blocks.append(reslora._C.formulas.Block(base.weight, base.bias, *factors, scaling))
            xs.append(x)
            if res_mode == "is":
                y = reslora._C.formulas.forward_is(blocks[n], x, xs[max(n - 1, 0)])
            else:
                y = reslora._C.formulas.forward_bs(blocks, n, 1, x)
            x = torch.tanh(y)
        torch.testing.assert_close(got, x)


def test_python_computes_no_formula():
    folder = Path(reslora.__file__).parent
    banned = re.compile(r"matmul|einsum|F\.linear|functional\.linear|norm\(|\baddmm|\bmm\(| @ ")
    sources = sorted(folder.rglob("*.py"))
    assert len(sources) >= 50
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            is_gradient = path.name == "trainer.py" and "grad" in line
            assert is_gradient or not banned.search(line), f"{path.name}:{number}: {line}"
        if path.name != "ops.py":
            assert "ops.reslora" not in path.read_text(), path.name


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_base_keeps_fp32_adapters(dtype):
    model = adapted(Net().to(dtype), res_mode="is")
    x = torch.randn(5, 6, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype and all(p.dtype == torch.float32 for p in trained(model))
    want = literal(adapted_copy(model), x.double(), "is", 1)
    torch.testing.assert_close(y.double(), want, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained(model))


def adapted_copy(model):
    import copy

    return copy.deepcopy(model).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_low_precision(dtype):
    for res_mode, pre_num in SHORTCUTS:
        model = adapted(Net(), res_mode=res_mode, pre_num=pre_num)
        x = torch.randn(5, 6)
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in trained(model))


def test_autocast_and_a_gradient_scaler_train():
    model = adapted(Net())
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    x, losses = torch.randn(16, 6), []
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (
            torch.ones(3, 6, dtype=torch.int64),
            r"x must be floating; got torch.int64 \(layer layers",
        ),
        (torch.ones(3, 5), r"in_features; got x \[3, 5\]"),
        (torch.ones(3, 6, **DOUBLE), r"dtype"),
    ],
)
def test_bad_inputs_are_refused(x, sentence):
    model = adapted(Net())
    with pytest.raises(ValueError, match=sentence) as caught:
        model(x)
    assert str(caught.value).endswith("lin)") and "\n" not in str(caught.value)
    want = torch.ones(3, 6)
    torch.testing.assert_close(model(want), literal(model, want, "is", 1))


# ---- Dropout


def test_dropout_is_drawn_in_training_only():
    model = adapted(res_mode="is", lora_dropout=0.5)
    x = torch.randn(8, 6, **DOUBLE)
    plain = literal(model, x, "is", 1)
    assert not torch.allclose(model(x), plain)
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first) and not torch.equal(model(x), first)
    model.eval()
    torch.testing.assert_close(model(x), plain)


# ---- Statistics


def test_norms_of_training_forwards_are_kept():
    model = adapted(res_mode="ms", pre_num=2, norm_window=3)
    layer = model.layers[0].lin
    for step in range(1, 6):
        x = torch.full((2, 6), float(step), **DOUBLE)
        model(x)
        assert layer.norm_count.item() == step
    kept = sorted(layer.norms[0].tolist())
    assert kept == pytest.approx([s * math.sqrt(12) for s in (3, 4, 5)], rel=1e-6)
    own = (x @ layer.reslora_A.T).square().sum().sqrt().item()
    assert layer.norms[1].max().item() == pytest.approx(own, rel=1e-6)
    mean = reslora._C.window_mean(layer.norms, layer.norm_count, "input")
    assert mean == pytest.approx(4 * math.sqrt(12), rel=1e-6)


def test_norms_are_kept_of_training_forwards_only():
    model = adapted()
    layer, x = model.layers[2].lin, torch.randn(3, 6, **DOUBLE)
    model.eval()(x)
    model.train()
    with torch.no_grad():
        model(x)
    assert layer.norm_count.item() == 0
    model(x)
    assert layer.norm_count.item() == 1 and layer.norms.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"norm_window": 0},
        {"res_mode": "none"},
        {"res_mode": "bs"},
        {"res_mode": "ms", "pre_num": 0},
    ],
)
def test_no_norms_where_none_are_needed(options):
    model = adapted(**options)
    model(torch.randn(3, 6, **DOUBLE))
    assert model.layers[1].lin.norms is None


def test_statistics_are_no_part_of_the_module_and_survive_casts():
    model = adapted(Net())
    model(torch.randn(3, 6))
    layer = model.layers[1].lin
    before = layer.norms.clone()
    assert {key.rsplit(".", 1)[1] for key in model.state_dict()} == {
        "weight", "bias", "reslora_A", "reslora_B",
    }  # fmt: skip
    assert not list(model.buffers())
    model.to(torch.bfloat16)
    assert layer.norms.dtype == torch.float32 and torch.equal(layer.norms, before)


def test_a_statistic_changes_nothing():
    model, x = adapted(), torch.randn(3, 6, **DOUBLE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with_norms = model(x)
    assert torch.equal(model.eval()(x), with_norms)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Elsewhere:
    """A tensor on a device that this machine need not have."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self.tensor.to(device)


def test_norms_move_with_the_input():
    model = adapted()
    layer = model.layers[1].lin
    layer.norms, layer.norm_count = Elsewhere(layer.norms), Elsewhere(layer.norm_count)
    model(torch.randn(3, 6, **DOUBLE))
    assert layer.norms.device.type == "cpu" and layer.norm_count.item() == 1


def test_a_run_on_the_meta_device_keeps_the_norms():
    model = adapted()
    model(torch.randn(3, 6, **DOUBLE))
    layer = model.layers[1].lin
    model.to("meta")(torch.randn(3, 6, device="meta", **DOUBLE))
    assert layer.norms.device.type == "cpu" and layer.norm_count.item() == 1


# ---- Base layers


class Loud(nn.Linear):
    """A black box: not exactly nn.Linear."""

    def forward(self, input):
        return super().forward(input) + 1


class Foreign(nn.Module):
    """A black box that is no nn.Linear, with a packed weight."""

    def __init__(self, width):
        super().__init__()
        self.in_features = self.out_features = width
        self.packed = nn.Parameter(torch.ones(width, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("kind", [Loud, Foreign])
@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_a_black_box_is_called_and_added_to(kind, res_mode):
    plain = Net()
    for block in plain.layers:
        block.lin = kind(6) if kind is Foreign else kind(6, 6)
    x = torch.randn(3, 6)
    want = plain(x)
    model = inject(plain, ResLoraConfig(r=2, target_modules=["lin"], res_mode=res_mode))
    torch.testing.assert_close(model(x), want)
    randomize(model)
    assert not torch.allclose(model(x), want)
    assert all(g.any() for g in gradients(model, x))


def test_a_black_box_equals_the_plain_layer_with_the_same_weight():
    class Subclass(nn.Linear):
        pass

    model = adapted(Net(), res_mode="ms", pre_num=2)
    x = torch.randn(3, 6)
    want, want_gradients = model(x), gradients(model, x)
    for block in model.layers:
        block.lin.base_layer.__class__ = Subclass
    torch.testing.assert_close(model(x), want)
    for a, b in zip(gradients(model, x), want_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_and_training_of_the_base_layer_are_kept():
    model, x = adapted(Net()), torch.randn(3, 6)
    want = model(x)
    base, seen = model.layers[1].lin.base_layer, []
    handle = base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), want)
    assert seen == [1]
    handle.remove()
    base.weight.requires_grad_(True)
    model(x).square().sum().backward()
    assert base.weight.grad.any()


def test_a_patched_forward_of_the_base_layer_is_called():
    model, x = adapted(Net()), torch.randn(3, 6)
    base = model.layers[0].lin.base_layer
    want = model(x)
    forward = base.forward
    base.forward = lambda x: forward(x)  # as accelerate does for device maps
    torch.testing.assert_close(model(x), want)
    base.forward = lambda x: forward(x) + 1
    assert not torch.allclose(model(x), want)


def test_conv1d_equals_the_same_linear_layers():
    model, ids = adapted(tiny_gpt2(), 0.2, target_modules=["c_fc"], res_mode="ms"), tokens()
    want = model(ids).logits
    for block in model.transformer.h:
        layer = block.mlp.c_fc
        linear = nn.Linear(16, 64)
        with torch.no_grad():
            linear.weight.copy_(layer.base_layer.weight.t())
            linear.bias.copy_(layer.base_layer.bias)
        layer.base_layer, layer.plain_type = linear.requires_grad_(False), nn.Linear
    torch.testing.assert_close(model(ids).logits, want)


def test_offloaded_neighbours_are_refused():
    model = adapted(Net(), res_mode="bs")
    layer = model.layers[0].lin
    layer.reslora_A = nn.Parameter(layer.reslora_A.to("meta"))
    with pytest.raises(ValueError, match=r"layers.1.lin reads must be loaded.*meta"):
        model.layers[1](torch.ones(2, 6))


def test_what_a_layer_shows():
    model = adapted(res_mode="is")
    assert "r=2, scaling=3, is 0 of 4, first, doubled" in repr(model.layers[0].lin)
    assert "r=2, scaling=1.5, is 2 of 4, linked to [1]" in repr(model.layers[2].lin)
    layer = model.layers[1].lin
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias


def test_the_op_is_called_once_for_a_layer(monkeypatch):
    calls = []
    adapt = ops.adapt
    monkeypatch.setattr(ops, "adapt", lambda *a, **k: calls.append(1) or adapt(*a, **k))
    adapted(Net(depth=3))(torch.randn(2, 6))
    assert len(calls) == 3


def test_a_causal_model_trains():
    model = tiny_llama(2, initializer_range=0.3)
    inject(model, ResLoraConfig(r=4, target_modules="all-linear", res_mode="is")).train()
    optimizer = torch.optim.Adam(trained(model), lr=0.02)
    ids, losses = tokens(4, 12), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(block.self_attn.q_proj.reslora_B.any() for block in model.model.layers)


def test_state_dict_grows_linearly():
    for depth in (2, 8):
        model = adapted(Net(depth=depth))
        assert len(model.state_dict()) == 4 * depth
    assert isinstance(model.layers[0], Block)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_the_output_may_be_changed_in_place_in_training(leading):
    """As nn.ReLU(inplace=True) after a layer does."""
    model = adapted(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), target_modules=["0"])
    x = torch.randn(*leading, 6)
    model(x).sum().backward()
    other = copy.deepcopy(model)
    other[1] = nn.ReLU()
    other.zero_grad()
    other(x).sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)
