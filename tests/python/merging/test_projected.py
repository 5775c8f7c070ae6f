"""The rule "projected": what training forwards leave, and merges from it without data."""

import copy

import pytest
import torch
from merged_errors import error_of, ids
from models import adapted, tiny_llama
from torch.utils.checkpoint import checkpoint

import reslora
from reslora import _C
from reslora.files.statistics import write_statistics
from reslora.injection.adapted import find_layers, injection_of
from reslora.merging.planning import make_plan

SHORTCUTS = [("is", 1), ("ms", 1), ("ms", -1)]


def trained(res_mode, pre_num, forwards=9, **options):
    """A model that has seen training forwards, and what each linked layer saw in them."""
    torch.manual_seed(3)
    options = {"res_mode": res_mode, "pre_num": pre_num, "r": 4} | options
    model = adapted(tiny_llama(4), 0.1, target_modules="all-linear", **options).train()
    linked = [x for x in find_layers(model) if x.wiring.taps]
    seen = {layer.name: [] for layer in linked}
    for layer in linked:
        layer.observer = lambda x, s, y, layer=layer: seen[layer.name].append(
            (x.detach().flatten(0, -2), s.detach().flatten(0, -2))
        )
    for seed in range(forwards):
        model(input_ids=ids(seed))
    for layer in linked:
        layer.observer = None
    return model, linked, seen


def sums_of(layer, x, s):
    rows = torch.cat([s, x @ layer.reslora_A.detach().T], 1)
    return rows.T @ rows


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_every_eighth_forward_adds_to_sums_that_decay(res_mode, pre_num):
    _, linked, seen = trained(res_mode, pre_num)
    assert _C.PRODUCTS_EVERY == 8
    for layer in linked:
        first, ninth = (sums_of(layer, *seen[layer.name][k]) for k in (0, 8))
        wanted = _C.PRODUCTS_DECAY * first + ninth
        torch.testing.assert_close(layer.products, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("res_mode", ["none", "bs"])
def test_what_merges_exactly_keeps_no_sums(res_mode):
    model, linked, _ = trained(res_mode, 1, 1)
    assert not linked and all(layer.products is None for layer in find_layers(model))


def test_nothing_is_added_in_eval_mode_without_gradients_and_in_a_recompute():
    model, linked, _ = trained("is", 1, 1)
    before = [layer.products.clone() for layer in linked]
    model.eval()(input_ids=ids(7))
    with torch.no_grad():
        model.train()(input_ids=ids(7))
    other, others, _ = trained("is", 1, 0)
    x = ids(0)
    checkpoint(lambda: other(input_ids=x).logits.sum(), use_reentrant=False).backward()
    for layer, again, kept in zip(linked, others, before, strict=True):
        assert torch.equal(layer.products, kept)
        torch.testing.assert_close(again.products, kept)


@torch.no_grad()
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_it_is_taken_without_data_and_not_worse_than_the_rules_of_the_paper(res_mode, pre_num):
    with torch.enable_grad():
        model, linked, _ = trained(res_mode, pre_num)
    model.eval()
    batches = [ids(seed) for seed in range(100, 104)]
    best = min(error_of(model, rule, batches) for rule in ("input", "weight", "factored"))
    assert error_of(model, "projected", batches) <= best
    report = reslora.merge(model)
    assert report.rule == "projected"
    assert all(0 < own.residual < 1 for own in report.layers if own.rule == "projected")
    assert len([own for own in report.layers if own.rule == "projected"]) == len(linked)


@torch.no_grad()
def test_the_predicted_error_is_that_of_the_rows():
    with torch.enable_grad():
        model, linked, seen = trained("ms", 1, 1)
    plan = {
        own.name: own for own in make_plan(injection_of(model, "test"), "projected", "t").layers
    }
    for layer in linked:
        (x, s), own = seen[layer.name][0], plan[layer.name]
        error = (s - x @ own.A.T).norm() / s.norm()
        assert own.residual == pytest.approx(float(error), rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_an_own_product_that_almost_vanishes_does_not_blow_up_the_merge():
    """By `input` alpha* of ms is the ratio of the own products: here thousands."""
    with torch.enable_grad():
        model, linked, _ = trained("ms", 1, 0)
        with torch.no_grad():
            for layer in linked:
                layer.reslora_A.mul_(1e-3)
        model(input_ids=ids(0))
    model.eval()
    batches = [ids(seed) for seed in range(100, 104)]
    projected, by_input = (error_of(model, rule, batches) for rule in ("projected", "input"))
    dropped = error_of(model, "weight", batches)
    assert projected <= 1.05 * dropped and by_input > projected


def test_it_is_saved_with_the_statistics_and_read_again(tmp_path):
    model, linked, _ = trained("is", 1)
    reslora.save_pretrained(model, tmp_path, statistics=True)
    read = reslora.load(tiny_llama(4), tmp_path)
    assert make_plan(injection_of(read, "test"), None, "test").layers[-1].rule == "projected"
    for layer, own in zip(linked, [x for x in find_layers(read) if x.wiring.taps], strict=True):
        assert torch.equal(layer.products, own.products)
    for layer in find_layers(read):  # as files of before have it
        layer.products = None
    write_statistics(injection_of(read, "test"), tmp_path)
    older = reslora.load(tiny_llama(4), tmp_path)
    assert make_plan(injection_of(older, "test"), None, "test").layers[-1].rule == "input"
    with pytest.raises(ValueError, match=r"'projected' needs the sums .* train with norm_window"):
        reslora.merge(older, "projected")


def test_a_copy_has_sums_of_its_own():
    model, linked, _ = trained("is", 1, 1)
    other = copy.deepcopy(model)
    other(input_ids=ids(50))
    fresh = [x for x in find_layers(other) if x.wiring.taps]
    for layer, own in zip(linked, fresh, strict=True):
        assert own.products is not layer.products


def test_sums_of_another_rank_and_of_nan_are_refused():
    model, linked, _ = trained("is", 1, 1)
    good = linked[0].products
    for wrong, what in ((torch.ones(6, 6), "layer's rank"), (good * float("nan"), "finite sums")):
        linked[0].products = wrong
        with pytest.raises(ValueError, match=what):
            reslora.merge(model)
