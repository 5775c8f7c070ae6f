"""merge, unmerge, merge_and_unload, unload: exact bits, the formulas, reports, refusals."""

import copy

import pytest
import torch
from models import (
    SHORTCUTS,
    Net,
    adapted,
    randomize,
    tiny_gpt2,
    tiny_llama,
    tokens,
    trained,
)
from torch import nn

from reslora import (
    _C,
    MergeReport,
    ResLoraConfig,
    calibrate,
    disable_adapter,
    export_lora,
    finish,
    inject,
    merge,
    merge_and_unload,
    unload,
    unmerge,
)
from reslora.injection.adapted import find_layers, injection_of
from reslora.merging import merge as merging

DOUBLE = {"dtype": torch.float64}
RULES = [
    *[(mode, m, "exact") for mode, m in SHORTCUTS if mode in ("none", "bs")],
    ("is", 1, "input"),
    ("is", 1, "weight"),
    ("is", 1, "factored"),
    *[("ms", m, rule) for m in (1, 3, -1) for rule in ("input", "weight", "factored")],
]


def x_of(seed=0):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def with_norms(model, steps=3):
    for seed in range(steps):
        model(x_of(seed))
    return model


def weights(model):
    return [m.weight.detach().clone() for m in model.modules() if type(m) is nn.Linear]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- merge and unmerge


@pytest.mark.parametrize(("res_mode", "pre_num", "rule"), RULES)
def test_merge_and_unmerge_restore_the_exact_bits(res_mode, pre_num, rule):
    model = with_norms(adapted(res_mode=res_mode, pre_num=pre_num))
    state = copy.deepcopy(model.state_dict())
    want = model(x_of())
    report = merge(model, rule)
    assert isinstance(report, MergeReport) and len(report.layers) == 4
    if rule == "exact":
        torch.testing.assert_close(model(x_of()), want)
    else:
        assert not torch.allclose(model(x_of()), want)
        assert {entry.rule for entry in report.layers[1:]} == {rule}
    assert not same(state.values(), model.state_dict().values())
    unmerge(model)
    assert same(state.values(), model.state_dict().values())
    assert torch.equal(model(x_of()), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_keeps_the_dtype_of_the_base(dtype):
    model = adapted(Net().to(dtype), res_mode="bs")
    before, x = weights(model), torch.randn(5, 6, dtype=dtype)
    want = model(x)
    merge(model)
    assert {w.dtype for w in weights(model)} == {dtype}
    torch.testing.assert_close(model(x), want, rtol=0.05, atol=0.05)
    layer = model.layers[0].lin
    exact = before[0].float() + 1.5 * (layer.reslora_B @ layer.reslora_A)
    torch.testing.assert_close(layer.weight, exact.to(dtype))
    unmerge(model)
    assert same(weights(model), before)


def formula_weights(model, rule, m):
    """Merged weights of a chain by the formulas, one layer after the other."""
    f = _C.formulas
    layers = [block.lin for block in model.layers]
    blocks = [
        f.Block(
            layer.weight,
            None,
            layer.reslora_A,
            layer.reslora_B,
            layer.chain.links.layers[n].scaling,
        )
        for n, layer in enumerate(layers)
    ]
    which = "own_product" if rule == "input" and m else "input"
    means = [_C.window_mean(layer.norms, layer.norm_count, which) for layer in layers]
    merged = []
    for n, block in enumerate(blocks):
        if n == 0:
            merged.append(f.merged_none(block) if m else f.merged_is(block, 1.0))
            continue
        reach = range(1, min(m or 1, n) + 1)
        norms = [w.square().sum().sqrt().item() for w in merged]
        if rule == "weight":
            alphas = [f.alpha_star_weight(norms, n, k) for k in reach]
        else:
            alphas = [f.alpha_star_input(means[n - k], means[n]) for k in reach]
        if not m:
            merged.append(f.merged_is(block, alphas[0]))
        elif rule == "input":
            merged.append(f.merged_ms_input(block, alphas))
        else:
            merged.append(f.merged_ms_weight(blocks, n, alphas))
    return merged


@pytest.mark.parametrize("rule", ["input", "weight", "factored"])
@pytest.mark.parametrize(("res_mode", "pre_num"), [("is", 1), ("ms", 1), ("ms", 2)])
def test_merged_weights_are_those_of_the_formulas(res_mode, pre_num, rule):
    model = with_norms(adapted(res_mode=res_mode, pre_num=pre_num))
    want = formula_weights(model, rule, pre_num if res_mode == "ms" else 0)
    merge(model, rule)
    for got, wanted in zip(weights(model), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_best_rule_for_what_is_at_hand():
    rules = [entry.rule for entry in merge(with_norms(adapted())).layers]
    assert rules == ["exact", "projected", "projected", "projected"]
    with pytest.warns(UserWarning, match="rule 'weight' is used: pass data="):
        report = merge(adapted())
    assert report.fell_back_to_weight and report.layers[1].rule == "weight"
    report = merge(with_norms(adapted(merge_method="weight")))
    assert not report.fell_back_to_weight and report.layers[1].rule == "weight"


def test_a_report_tells_the_errors_of_layers_and_model():
    model = with_norms(adapted(Net(depth=2).double(), res_mode="ms"))
    x, inputs = x_of(9), []
    handle = model.layers[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    want = model(x)
    y = model.layers[1].lin.base_layer(inputs[0])
    handle.remove()
    unmerged = torch.atanh(want)
    model.train()
    report = merge(model, "input", verify={"x": x})
    assert model.training and model.layers[0].lin.base_layer.training
    factors = model.layers[1].lin
    alpha = report.layers[1].alpha_star
    low_rank = inputs[0] @ factors.reslora_A.T @ factors.reslora_B.T
    merged = y + 1.5 * (1 + sum(alpha)) * low_rank
    error = (merged - unmerged).square().sum().sqrt() / unmerged.square().sum().sqrt()
    assert report.layers[1].output_error == pytest.approx(error.item(), rel=1e-6)
    assert report.layers[0].output_error < 1e-12
    error = (model(x) - want).square().sum().sqrt() / want.square().sum().sqrt()
    assert report.output_error == pytest.approx(error.item(), rel=1e-6)
    text = str(report)
    assert "layers.1.lin  input" in text and f"{alpha[0]:.4f}" in text and "model" in text


@pytest.mark.parametrize("kind", ["dict", "tuple", "tensor"])
def test_a_batch_in_any_form(kind):
    model, ids = adapted(tiny_llama(2), 0.2, target_modules=["q_proj"], res_mode="bs"), tokens()
    batch = {"dict": {"input_ids": ids}, "tuple": (ids,), "tensor": ids}[kind]
    report = merge(model, verify=batch)
    assert report.output_error < 1e-5 and all(e.output_error < 1e-5 for e in report.layers)


def test_a_batch_that_the_model_refuses_leaves_it_unmerged():
    model = with_norms(adapted())
    before = weights(model)
    with pytest.raises(ValueError, match="in_features"):
        merge(model, verify=torch.ones(2, 5, **DOUBLE))
    assert same(weights(model), before) and not model.layers[0].lin.is_merged
    assert not model.layers[0].lin._forward_hooks
    merge(model)


# ---- merge_and_unload, unload


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("res_mode", ["none", "is", "bs", "ms"])
def test_merge_and_unload_returns_the_plain_base_model(make, res_mode):
    model, ids = make(), tokens()
    kinds = [(name, type(m)) for name, m in model.named_modules()]
    keys, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    adapted(model, 0.2, target_modules="all-linear", res_mode=res_mode).train()
    for _ in range(2):
        model(ids)
    model.eval()
    merge(model)
    want = model(ids).logits
    unmerge(model)
    got = merge_and_unload(model, progressbar=False)
    assert got is model and [(name, type(m)) for name, m in model.named_modules()] == kinds
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(ids).logits, want)
    with pytest.raises(ValueError, match="model must be adapted"):
        merge(model)


def test_merge_and_unload_of_a_merged_model():
    model = with_norms(adapted())
    merge(model, "weight")
    want = model(x_of())
    with pytest.raises(
        ValueError, match="the model is merged by 'weight'; got merge_method 'input'"
    ):
        merge_and_unload(model, "input")
    assert torch.equal(merge_and_unload(model)(x_of()), want)


def test_unload_of_a_merged_model_gives_the_base_back():
    model = Net().double()
    before, want = weights(model), model(x_of())
    merge(with_norms(adapted(model)))
    unload(model)
    assert same(weights(model), before) and torch.equal(model(x_of()), want)


def test_a_progress_bar_counts_layers(capsys):
    merge(adapted(res_mode="bs"), progressbar=True)
    assert "merging: 100%" in capsys.readouterr().err


# ---- Refusals


def test_twice_merged_or_unmerged_is_refused():
    model = adapted(res_mode="bs")
    with pytest.raises(ValueError, match="adapters must be merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match="must not be merged yet"):
        merge(model)
    with pytest.raises(ValueError, match="unmerge first"), disable_adapter(model):
        pass


@pytest.mark.parametrize(
    ("options", "rule", "sentence"),
    [
        ({"res_mode": "is"}, "exact", "exact"),
        ({"res_mode": "is"}, "best", "best"),
        ({"res_mode": "is", "norm_window": 0}, "input", "norm"),
    ],
)
def test_a_rule_that_cannot_serve_is_refused(options, rule, sentence):
    model = adapted(**options)
    before = weights(model)
    with pytest.raises(ValueError, match=sentence) as caught:
        merge(model, rule)
    assert "\n" not in str(caught.value) and same(weights(model), before)
    assert not model.layers[0].lin.is_merged


def test_safe_merge_refuses_what_is_not_finite():
    model = adapted(res_mode="bs")
    with torch.no_grad():
        model.layers[2].lin.base_layer.weight[0, 0] = float("inf")
    before = weights(model)
    with pytest.raises(ValueError, match=r"must be finite and fit .* layers\.2\.lin"):
        merge(model, safe_merge=True)
    assert same(weights(model), before)
    merge(model)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_adapter_that_is_not_finite_is_never_merged_or_exported(value, tmp_path):
    model = adapted(res_mode="bs")
    before = weights(model)
    with torch.no_grad():
        model.layers[2].lin.reslora_B[0, 0] = float(value)
    for call in (merge, merge_and_unload, lambda m: export_lora(m, tmp_path / "lora")):
        with pytest.raises(ValueError, match=r"must be finite; got NaN or .* layers\.2\.lin"):
            call(model)
    assert same(weights(model), before) and not (tmp_path / "lora").exists()


def test_a_weight_that_would_not_fit_into_fp16_is_not_written():
    model = adapted(Net().half(), res_mode="bs")
    with torch.no_grad():
        model.layers[2].lin.reslora_A.fill_(3e4)
        model.layers[2].lin.reslora_B.fill_(3e4)
    before = weights(model)
    for call in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=r"fit into their dtype; got .* Half .layer layers\.2"):
            call(model)
    assert same(weights(model), before)


def test_a_base_without_a_plain_weight_is_refused():
    class Packed(nn.Module):
        in_features = out_features = 6

        def forward(self, x):
            return x

    model = Net()
    model.layers[1].lin = Packed()
    adapted(model, res_mode="none")
    before = weights(model)
    with pytest.raises(ValueError, match=r"must hold a plain weight; got Packed \(layer layers.1"):
        merge(model)
    assert same(weights(model), before)


def test_a_weight_of_two_layers_is_refused():
    model = Net()
    model.layers[1].lin.weight = model.layers[3].lin.weight
    with pytest.raises(ValueError, match="must belong to one layer"):
        merge(adapted(model, res_mode="none"))
    shared = nn.ModuleDict({"a": nn.Linear(3, 3)})
    shared["b"] = shared["a"]
    inject(shared, ResLoraConfig(target_modules=["a"], res_mode="none"))
    x = torch.randn(2, 3)
    want = randomize(shared)["b"](x)
    merge(shared)
    torch.testing.assert_close(shared["b"](x), want)


def test_a_copy_of_a_merged_model_cannot_be_unmerged():
    model = with_norms(adapted())
    merge(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(x_of()), model(x_of()))
    with pytest.raises(ValueError, match="originals must be at hand"):
        unmerge(other)
    unmerge(model)


def test_disabled_adapters_are_not_merged():
    model = adapted(res_mode="bs")
    with disable_adapter(model), pytest.raises(ValueError, match="must be enabled"):
        merge(model)


def test_links_that_were_not_always_used_are_reported():
    model = with_norms(adapted())
    model.layers[2](x_of())
    with pytest.warns(UserWarning, match=r"1 layers were trained .* \(layers.2.lin"):
        merge(model)


class Interrupting:
    """A bar that is interrupted at its second update."""

    n = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def update(self, count):
        self.n += count
        if self.n == 2:
            raise KeyboardInterrupt


def test_an_interrupt_while_weights_are_written_leaves_one_model_or_the_other(monkeypatch):
    monkeypatch.setattr(merging, "bar", lambda *_, **__: Interrupting())
    model = adapted(res_mode="is")
    x = torch.randn(3, 6, **DOUBLE)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        merge(model, "weight")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    reference = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        merge_and_unload(model, "weight")
    assert all(layer.is_merged for layer in find_layers(model))
    monkeypatch.undo()
    merge(reference, "weight")
    assert torch.equal(model(x), reference(x))
    model = merge_and_unload(model)
    assert not find_layers(model) and torch.equal(model(x), reference(x))


@pytest.mark.parametrize("data", [[], ()])
def test_no_batches_are_refused_and_the_fits_stay(data, tmp_path):
    model = adapted(res_mode="is")
    calibrate(model, [torch.randn(20, 6, **DOUBLE)])
    fits = injection_of(model, "test").calibrated
    for call in (
        lambda: merge(model, data=data),
        lambda: merge_and_unload(model, data=data),
        lambda: export_lora(model, tmp_path / "lora", data=data),
        lambda: finish(model, data),
    ):
        with pytest.raises(ValueError, match="data must hold a batch; got an empty"):
            call()
    assert injection_of(model, "test").calibrated is fits


def test_an_iterator_cannot_serve_calibration_and_refining():
    model = adapted(res_mode="is")
    batches = (torch.randn(20, 6, **DOUBLE) for _ in range(9))
    with pytest.raises(ValueError, match="data is read twice"):
        merge(model, data=batches, refine_steps=3)


def test_a_refused_export_gives_the_fits_back(tmp_path):
    model = adapted(res_mode="is")
    calibrate(model, [torch.randn(20, 6, **DOUBLE)])
    fits = injection_of(model, "test").calibrated
    with pytest.raises(ValueError, match="more than held_out"):
        export_lora(model, tmp_path, data=[torch.randn(30, 6, **DOUBLE)], refine_steps=2)
    assert injection_of(model, "test").calibrated is fits
    with pytest.raises(ValueError, match="rank must be at least 1, and whole"):
        export_lora(model, tmp_path, rank=1.5)


def test_a_merged_model_neither_trains_nor_records():
    model = with_norms(adapted())
    merge(model)
    count = find_layers(model)[1].norm_count.item()
    assert not model(x_of()).requires_grad and find_layers(model)[1].norm_count.item() == count
    unmerge(model)
    model(x_of()).sum().backward()
    assert all(p.grad is not None for p in trained(model))
