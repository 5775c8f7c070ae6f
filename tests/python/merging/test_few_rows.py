"""A calibration on few rows: held to the paper's rules, so that it is not worse than they are."""

import copy

import pytest
import torch
from merged_errors import error_of, ids
from models import adapted, tiny_llama

from reslora import calibrate, merge_report
from reslora.injection.adapted import injection_of

RULES = ("input", "weight", "factored")


@pytest.fixture(scope="module")
def models():
    """Adapted models that have recorded norms, by shortcut."""
    found = {}
    for res_mode, pre_num in (("is", 1), ("ms", 2)):
        torch.manual_seed(3)
        options = {"res_mode": res_mode, "pre_num": pre_num, "r": 4}
        model = adapted(tiny_llama(4), 0.1, target_modules="all-linear", **options).train()
        for seed in range(6):
            model(input_ids=ids(seed, 4, 24))
        found[res_mode] = model.eval()
    return found


@torch.no_grad()
@pytest.mark.parametrize("res_mode", ["is", "ms"])
@pytest.mark.parametrize("columns", [16, 64])
def test_a_fit_of_few_rows_is_not_worse_than_the_best_rule_of_the_paper(models, res_mode, columns):
    model = copy.deepcopy(models[res_mode])
    batches = [ids(seed, 8, 24) for seed in range(100, 104)]
    best = min(error_of(model, rule, batches) for rule in RULES)
    calibrate(model, [{"input_ids": ids(50, 1, columns)}], move_taps=False)
    assert error_of(model, "lsq", batches) <= best


@torch.no_grad()
def test_without_norms_a_fit_of_few_rows_is_still_held(models):
    model = copy.deepcopy(models["is"])
    for layer in injection_of(model, "test").layers:
        layer.norms = layer.norm_count = None
    batches = [ids(seed, 8, 24) for seed in range(100, 104)]
    plain = error_of(model, "weight", batches)
    calibrate(model, [{"input_ids": ids(50, 2, 32)}], move_taps=False)
    assert error_of(model, "lsq", batches) <= plain
    assert merge_report(model, [{"input_ids": batches[0]}]).rule == "lsq"
