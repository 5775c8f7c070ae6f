"""refine: distillation lowers the held-out loss, touches nothing else, refuses what cannot be."""

import copy

import pytest
import torch
from models import Net, adapted, tiny_bert, tiny_llama, tokens

from reslora import calibrate, export_lora, merge, merge_and_unload, merge_report, refine
from reslora.injection.adapted import find_layers, injection_of

DOUBLE = {"dtype": torch.float64}
# So large a ridge keeps A' = A: the fits lack all that the taps bring, so there is much to gain.
NO_FIT = {"ridge": 1e9, "move_taps": False}


def llama():
    torch.manual_seed(5)
    return adapted(tiny_llama(4), 0.2, target_modules="all-linear", res_mode="is")


def batches(count, seed=0, length=12):
    torch.manual_seed(seed)
    return [{"input_ids": tokens(4, length)} for _ in range(count)]


def fits(model):
    return injection_of(model, "test").calibrated.fits


def test_refining_comes_nearer_to_the_trained_model():
    model, data = llama(), batches(42)
    calibrate(model, data, **NO_FIT)
    before = merge_report(model, batches(4, 9)).kl
    result = refine(model, data, 40, lr=5e-3)
    report = merge_report(model, batches(4, 9))
    assert report.kl < 0.8 * before
    assert result.loss_after < result.loss_before and result.kind == "kl"
    assert {entry.rule for entry in report.layers} == {"refined"}
    assert result.losses[0] == (0, result.loss_before) and result.losses[-1][0] == 40
    assert min(loss for _, loss in result.losses) == result.loss_after


def test_the_held_out_loss_is_the_kl_of_the_report():
    model, data = llama(), batches(6)
    calibrate(model, data)
    result = refine(model, data, 4)
    assert merge_report(model, data[:2]).kl == pytest.approx(result.loss_after, rel=1e-3)


def test_merging_with_refine_steps_is_calibrating_refining_and_merging():
    # One batch is trained on and measured: a step against its gradient lowers its loss.
    model, data = llama(), batches(1) * 8
    twin = copy.deepcopy(model)
    calibrate(twin, data)
    assert refine(twin, data, 6).best_step > 0
    merge(twin)
    report = merge(model, data=data, refine_steps=6, verify=batches(1, 3))
    for one, other in zip(find_layers(model), find_layers(twin), strict=True):
        torch.testing.assert_close(one.base_layer.weight, other.base_layer.weight)
    assert report.rule == "refined"


def test_refining_leaves_the_adapter_gradients_and_modes_alone():
    model = adapted(tiny_bert(), 0.2, target_modules=["query"], modules_to_save=["classifier"])
    data = [{"input_ids": tokens()} for _ in range(5)]
    model.train()
    model(tokens()).logits.sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    state = copy.deepcopy(model.state_dict())
    calibrate(model, data)
    refine(model, data, 3)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(state[name], parameter)
        if name in before:
            assert torch.equal(parameter.grad, before[name])
    assert all(layer.stand_in is None for layer in find_layers(model))


def test_outputs_without_classes_are_refined_by_their_squared_error():
    model = adapted(res_mode="ms", pre_num=2)
    data = [torch.randn(30, 6, **DOUBLE) for _ in range(40)]
    calibrate(model, data, **NO_FIT)
    before = merge_report(model, data[:2]).output_error
    result = refine(model, data, 30, lr=5e-3)
    assert result.kind == "mse"
    assert merge_report(model, data[:2]).output_error < before


def test_only_the_best_is_kept():
    model, data = llama(), batches(6)
    calibrate(model, data)
    want = {name: fit.A.clone() for name, fit in fits(model).items()}
    result = refine(model, data, 4, lr=10.0)  # far too large: nothing it makes is better
    assert result.best_step == 0 and result.loss_after == result.loss_before
    for name, A in want.items():
        torch.testing.assert_close(fits(model)[name].A, A)
    assert merge_report(model, data[:1]).rule == "lsq"


def test_exact_merges_are_not_refined():
    model = adapted(res_mode="bs")
    data = [torch.randn(5, 6, **DOUBLE) for _ in range(4)]
    report = merge(model, data=data, refine_steps=5)
    assert {entry.rule for entry in report.layers} == {"exact"}


def test_refined_fits_are_exported(tmp_path):
    from peft import PeftModel

    model, data = llama(), batches(6)
    base = tiny_llama(4)
    plain = copy.deepcopy(model)
    export_lora(plain, tmp_path, data=data, refine_steps=3)
    merge(plain)
    state = {k: v for k, v in merge_and_unload(plain).state_dict().items()}
    base.load_state_dict(_unmerged(model))
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-5)


def _unmerged(model):
    state = model.state_dict()
    names = {k: k.replace(".base_layer", "") for k in state if "reslora_" not in k}
    return {names[k]: state[k] for k in names}


# ---- refusals


def test_refining_needs_fits_and_sensible_options():
    model, data = llama(), batches(3)
    with pytest.raises(ValueError, match="call calibrate first"):
        refine(model, data)
    calibrate(model, data)
    for options, match in (
        ({"steps": 0}, "steps must be"),
        ({"steps": 1.5}, "steps must be"),
        ({"held_out": 0}, "held_out must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
    ):
        with pytest.raises(ValueError, match=match):
            refine(model, data, **options)


def test_too_few_batches_are_refused_and_repeats_are_reported():
    model, data = llama(), batches(4)
    calibrate(model, data)
    before = fits(model)
    with pytest.raises(ValueError, match="more than held_out = 2 batches; got 2"):
        refine(model, data[:2], 3)
    with pytest.raises(ValueError, match="a batch for each step; got 2 that can be read once"):
        refine(model, iter(data), 3)
    assert fits(model) is before
    with pytest.warns(UserWarning, match=r"more batches than the 2 given.*repeated 1 times"):
        refine(model, data, 4)


def test_a_padded_batch_without_mask_is_refused():
    model = adapted(tiny_llama(pad_token_id=0), 0.2, target_modules=["q_proj"], res_mode="is")
    data = batches(4)
    calibrate(model, data)
    data[3]["input_ids"][0, -1] = 0
    with pytest.raises(ValueError, match="begin or end with pad_token_id 0"):
        refine(model, data, 2)


def test_fits_of_a_changed_adapter_are_not_refined():
    model = adapted(Net().double(), res_mode="is")
    data = [torch.randn(20, 6, **DOUBLE) for _ in range(4)]
    calibrate(model, data)
    with torch.no_grad():
        model.layers[0].lin.reslora_A.mul_(2)
    with pytest.raises(ValueError, match="before it changed"):
        refine(model, data, 2)


@pytest.mark.parametrize("place", [0, 3])
def test_a_batch_that_is_not_finite_is_refused(place):
    model = adapted(res_mode="is")
    data = [torch.randn(20, 6, **DOUBLE) for _ in range(6)]
    calibrate(model, data)
    before = fits(model)
    data[place] = data[place] * float("nan")
    with pytest.raises(ValueError, match="loss must be finite; got nan"):
        refine(model, data, 4)
    assert fits(model) is before
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        refine(model, data, 4)
