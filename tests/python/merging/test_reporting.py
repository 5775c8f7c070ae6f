"""merge_report, verify and max_error, plots: measured on the model as it is, against the merge."""

import copy
import math

import pytest
import torch
from models import LINKED, Net, adapted, tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn

from reslora import MergeReport, calibrate, merge, merge_and_unload, merge_report, plots
from reslora.injection.adapted import find_layers

DOUBLE = {"dtype": torch.float64}


def rows(count=20, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def with_norms(model):
    model(rows())
    return model


def relative(got, want):
    return ((got - want).square().sum().sqrt() / want.square().sum().sqrt()).item()


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("none", 1), ("bs", 2)])
def test_a_report_measures_what_merging_will_change_and_changes_nothing(res_mode, pre_num):
    model = with_norms(adapted(res_mode=res_mode, pre_num=pre_num))
    state, batches = copy.deepcopy(model.state_dict()), [rows(seed=1), rows(7, seed=2)]
    want = torch.cat([model(x) for x in batches])
    report = merge_report(model, batches, "input" if res_mode in ("is", "ms") else None)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(x.stand_in is None and x.observer is None for x in find_layers(model))
    merge(model, report.rule)
    got = torch.cat([model(x) for x in batches])
    assert report.output_error == pytest.approx(relative(got, want), rel=1e-6, abs=1e-12)
    assert report.kl is None and report.top1_agreement is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_and_method_are_told_apart(dtype):
    torch.manual_seed(3)
    x = torch.randn(50, 6, dtype=dtype)
    exact = merge_report(adapted(Net().to(dtype), 0.3, res_mode="bs"), [x])
    step = torch.finfo(dtype).eps
    for entry in exact.layers:
        assert entry.method_error < step and 0 < entry.rounding_error < step
        assert entry.output_error < 2 * step
    model = adapted(Net().to(dtype), 0.3, res_mode="is")
    report = merge_report(model, [x], "weight")
    assert report.layers[2].method_error > 10 * report.layers[2].rounding_error > 0


def test_fp64_weights_round_nothing():
    report = merge_report(with_norms(adapted(res_mode="is")), [rows()], "input")
    assert report.layers[1].rounding_error < 1e-15 < report.layers[1].method_error
    assert report.layers[1].output_error == pytest.approx(report.layers[1].method_error)


def test_kl_and_agreement_are_those_of_the_merged_model():
    model = adapted(tiny_llama(4), 0.3, target_modules="all-linear", res_mode="ms", pre_num=2)
    ids = tokens(4, 12)
    with torch.no_grad():
        before = model(ids).logits
    report = merge_report(model, {"input_ids": ids}, "weight")
    merge(model, "weight")
    with torch.no_grad():
        after = model(ids).logits
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    assert report.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert report.top1_agreement == pytest.approx(
        (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    )
    assert report.rows == 48 and "same largest logit in" in str(report)


def test_padding_is_left_out_of_a_report():
    model = adapted(tiny_llama(pad_token_id=0), 0.3, target_modules="all-linear", res_mode="is")
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    ids[mask == 0] = 0
    padded = merge_report(model, {"input_ids": ids, "attention_mask": mask}, "weight")
    alone = merge_report(model, [ids[:1, :5], ids[1:]], "weight")
    assert padded.rows == alone.rows == 13
    assert padded.kl == pytest.approx(alone.kl, rel=1e-3)
    for one, other in zip(padded.layers, alone.layers, strict=True):
        assert one.output_error == pytest.approx(other.output_error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_models_of_other_kinds_are_measured(make):
    targets = ["c_attn", "c_proj"] if make is tiny_gpt2 else ["query", "value"]
    model = adapted(make(), 0.3, target_modules=targets, res_mode="is")
    report = merge_report(
        model, {"input_ids": tokens(), "attention_mask": torch.ones(2, 7)}, "weight"
    )
    assert report.output_error > 0 and len(report.layers) == len(find_layers(model))
    assert report.rows == (14 if make is tiny_gpt2 else 2)


class BlackBox(nn.Module):
    """A base layer without a weight that could be merged into."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 6
        self.hidden = nn.Parameter(torch.randn(6, 6, **DOUBLE), requires_grad=False)

    def forward(self, x):
        return x @ self.hidden


def test_a_base_without_weight_has_a_method_error_only():
    net = Net().double()
    for block in net.layers:
        block.lin = BlackBox()
    model = with_norms(adapted(net, res_mode="is"))
    report = merge_report(model, [rows()], "input")
    assert report.rounding_error is None and report.layers[1].rounding_error is None
    assert report.method_error == report.output_error > 0
    with pytest.raises(ValueError, match="must hold a plain weight"):
        merge(model, "input")


# ---- verify and max_error


@pytest.mark.parametrize("call", [merge, merge_and_unload])
def test_an_error_above_the_limit_leaves_the_model_as_it_was(call):
    model = with_norms(adapted(res_mode="is"))
    state, want = copy.deepcopy(model.state_dict()), model(rows())
    error = merge_report(model, [rows()], "input").output_error
    with pytest.raises(ValueError, match=r"at most max_error 1e-06; got .* by input \(nothing was"):
        call(model, "input", verify=[rows()], max_error=1e-6)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model(rows()), want) and not model.layers[0].lin.is_merged
    call(model, "input", verify=[rows()], max_error=1.01 * error)


def test_an_output_that_is_not_finite_is_above_any_limit():
    model = with_norms(adapted(res_mode="is"))
    bad = torch.full((2, 6), float("inf"), **DOUBLE)
    with pytest.raises(ValueError, match="max_error"):
        merge(model, "input", verify=[bad], max_error=1e9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_error": 0.1}, "needs batches to measure on"),
        ({"max_error": -1, "verify": [1]}, "max_error must be"),
        ({"max_error": math.nan, "verify": [1]}, "max_error must be"),
        ({"verify": []}, "must hold a batch"),
    ],
)
def test_bad_limits_are_refused(options, match):
    model = adapted(res_mode="bs")
    with pytest.raises(ValueError, match=match):
        merge(model, **options)
    assert not model.layers[0].lin.is_merged


def test_a_merged_model_is_not_measured():
    model = adapted(res_mode="bs")
    merge(model)
    with pytest.raises(ValueError, match="must not be merged"):
        merge_report(model, [rows()])


# ---- plots


def test_plots_show_every_layer_and_rule():
    model = adapted(tiny_llama(), 0.3, target_modules=["q_proj", "down_proj"], res_mode="is")
    batches = [tokens(4, 10)]
    reports = {"weight": merge_report(model, batches, "weight")}
    calibrate(model, batches)
    reports["lsq"] = merge_report(model, batches)
    heat = plots.merge_errors(reports["lsq"]).axes[0]
    shown = heat.images[0].get_array()
    assert shown.shape == (3, 2) and [t.get_text() for t in heat.get_yticklabels()] == [
        "0",
        "1",
        "2",
    ]
    entry = next(e for e in reports["lsq"].layers if e.name.endswith("2.mlp.down_proj"))
    assert shown[2, 1] == pytest.approx(entry.output_error)
    axes = plots.errors_by_rule(reports).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["weight", "lsq"]


def test_plots_of_nothing_are_refused():
    empty = MergeReport()
    with pytest.raises(ValueError, match="must hold measurements"):
        plots.merge_errors(empty)
    with pytest.raises(ValueError, match="must hold measurements"):
        plots.errors_by_rule({"input": empty})
    with pytest.raises(ValueError, match="kind must be one of"):
        plots.merge_errors(empty, "error")
