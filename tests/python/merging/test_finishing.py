"""finish: in the middle of training every layer becomes plain LoRA, and training goes on."""

import copy

import pytest
import torch
from models import Net, adapted, tiny_bert, tiny_llama, tokens, trained

from reslora import (
    ResLoraConfig,
    calibrate,
    export_lora,
    finish,
    inject,
    load,
    merge,
    merge_and_unload,
    merge_report,
    print_links,
    refine,
    save_pretrained,
)
from reslora.injection.adapted import find_layers, injection_of

DOUBLE = {"dtype": torch.float64}
SHORTCUTS = [("is", 1), ("ms", 1), ("ms", 2), ("ms", -1)]


def rows(count=60, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), **DOUBLE)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"first_block": "plain"}])
def test_the_finished_model_computes_what_lsq_would_merge(res_mode, pre_num, options):
    model = adapted(res_mode=res_mode, pre_num=pre_num, **options)
    merged = copy.deepcopy(model)
    calibrate(merged, [rows()], move_taps=False)  # a layer that is finished keeps its rank
    merge(merged)
    parameters = [id(p) for p in model.parameters()]
    B = [layer.reslora_B.clone() for layer in find_layers(model)]
    result = finish(model, [rows()])
    assert result.rows == 60
    assert [id(p) for p in model.parameters()] == parameters
    torch.testing.assert_close(model(rows(seed=1)), merged(rows(seed=1)), rtol=1e-9, atol=1e-11)
    assert all(torch.equal(b, x.reslora_B) for b, x in zip(B, find_layers(model), strict=True))
    assert "0 linked" in print_links(model)


def test_the_step_size_of_a_layer_is_kept():
    model = adapted(res_mode="is")
    calibrate(model, [rows()], move_taps=False)
    fits = injection_of(model, "test").calibrated.fits
    want = {name: 1.5 * (1 + fit.alpha_star) for name, fit in fits.items()}
    finish(model)
    scaling = {x.name: x.scaling for c in injection_of(model, "t").chains for x in c.links.layers}
    assert scaling["layers.0.lin"] == pytest.approx(3.0)  # the doubled first layer
    for name, value in want.items():
        factor = min(max(value / 1.5, 0.5), 8.0)
        assert scaling[name] == pytest.approx(1.5 * factor)


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_training_goes_on_with_the_same_optimizer_and_merges_exactly(res_mode, pre_num):
    torch.manual_seed(0)
    model = inject(
        Net().double(),
        ResLoraConfig(r=2, target_modules=["lin"], res_mode=res_mode, pre_num=pre_num),
    )
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    x = rows()
    target = torch.tanh(x.roll(1, 1) * 1.5)
    losses = []
    for step in range(60):
        if step == 30:
            finish(model, [x], step=step)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[30] < losses[0]  # the fit costs a little, training gains it back
    want = model(x)
    report = merge(model)
    assert {entry.rule for entry in report.layers} == {"exact"}
    torch.testing.assert_close(model(x), want)


def test_a_finished_adapter_is_saved_with_what_it_was(tmp_path):
    model = adapted(res_mode="ms", pre_num=2, rank_pattern={"1.lin": 2}, finish_at=0.7)
    finish(model, [rows()], step=70)
    save_pretrained(model, tmp_path)
    twin = Net().double()
    twin.load_state_dict({k.replace(".base_layer", ""): v for k, v in _base(model).items()})
    load(twin, tmp_path)
    assert torch.equal(twin(rows()), model(rows()))
    config = injection_of(twin, "test").config
    assert (config.res_mode, config.finished_from, config.finished_step) == ("none", "ms", 70)
    assert config.finish_at is None
    assert {entry.rule for entry in merge_report(twin, [rows()]).layers} == {"exact"}


def _base(model):
    return {k: v for k, v in model.state_dict().items() if "reslora_" not in k}


def test_a_transformer_is_finished_in_training_mode():
    torch.manual_seed(0)
    model = adapted(tiny_llama(4), 0.05, target_modules="all-linear", res_mode="is").train()
    batches = [{"input_ids": tokens(4, 12)} for _ in range(4)]
    before = merge_report(model, batches, "weight").kl
    with torch.no_grad():
        model.eval()
        want = model(**batches[0]).logits
    model.train()
    finish(model, batches)
    assert model.training
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in trained(model))
    model.eval()
    with torch.no_grad():
        got = model(**batches[0]).logits
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).mean() < before
    model.zero_grad()
    merge_and_unload(model)
    assert not find_layers(model)


@pytest.mark.parametrize("res_mode", ["none", "bs"])
def test_exact_shortcuts_stay_as_they_are(res_mode):
    model = adapted(res_mode=res_mode)
    want = model(rows())
    finish(model, [rows()])
    assert torch.equal(model(rows()), want)
    assert injection_of(model, "test").config.res_mode == res_mode


def test_heads_and_their_gradients_stay():
    model = adapted(
        tiny_bert(), 0.2, target_modules=["query"], modules_to_save=["classifier"], res_mode="is"
    )
    head = model.classifier.weight.clone()
    finish(model, [{"input_ids": tokens(4, 8)}])
    assert torch.equal(model.classifier.weight, head) and model.classifier.weight.requires_grad


def test_what_cannot_be_finished_is_refused_and_unchanged():
    model = adapted(res_mode="is")
    want = model(rows())
    with pytest.raises(ValueError, match=r"needs a fit of every linked layer"):
        finish(model)
    with pytest.raises(ValueError, match="step must be"):
        finish(model, [rows()], step=-1)
    with pytest.raises(ValueError, match="must be finite"):
        finish(model, [rows() * float("nan")])
    assert torch.equal(model(rows()), want)
    merge(model, data=[rows()])
    with pytest.raises(ValueError, match="must not be merged"):
        finish(model, [rows()])


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, "0.7", True])
def test_a_share_of_the_steps_lies_between_0_and_1(share):
    with pytest.raises(ValueError, match="finish_at must lie above 0 and below 1"):
        ResLoraConfig(finish_at=share)


@pytest.mark.parametrize("leave", [merge_and_unload, export_lora])
def test_a_finish_that_nothing_did_is_reported(tmp_path, leave):
    model = adapted(finish_at=0.5)
    calibrate(model, [rows()])
    folder = [tmp_path / "lora"] if leave is export_lora else []
    with pytest.warns(UserWarning, match=r"finish_at is 0.5, but the training was not finished"):
        leave(model, *folder)


def test_refined_fits_are_finished_whole():
    model = adapted(res_mode="ms", pre_num=2)
    batches = [rows(seed=k) for k in range(6)]
    calibrate(model, batches)
    refine(model, batches, 20, lr=0.02)
    merged = copy.deepcopy(model)
    assert merge(merged).rule == "refined"
    finish(model)
    torch.testing.assert_close(model(rows(seed=9)), merged(rows(seed=9)), rtol=1e-9, atol=1e-11)
