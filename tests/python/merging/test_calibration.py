"""calibrate: the fit against NumPy, padding, memory limits, refusals, what it leaves alone."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from models import (
    LINKED,
    Net,
    adapted,
    randomize,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    tokens,
    trained,
)
from torch import nn

from reslora import (
    ResLoraConfig,
    calibrate,
    disable_adapter,
    inject,
    merge,
    merge_report,
    refine,
    unmerge,
)
from reslora.injection.adapted import injection_of

DOUBLE = {"dtype": torch.float64}


# Whether taps are moved is measured, and may go either way: test_tap_moves.py tests it.
fit_layers = functools.partial(calibrate, move_taps=False)


def rows(count=40, seed=0, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def fits(model):
    return injection_of(model, "test").calibrated.fits


def seen(model, batches):
    """What every layer reads and what enters its B, by hooks and taps written out."""
    xs = {layer.name: [] for layer in injection_of(model, "test").layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: xs[m.name].append(args[0].detach()))
        for layer in injection_of(model, "test").layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    xs = {name: torch.cat(parts) for name, parts in xs.items()}
    vs = {}
    for chain in injection_of(model, "test").chains:
        for n, layer in enumerate(chain.layers):
            v = xs[layer.name] @ layer.reslora_A.T
            for j in chain.links.reached(n):
                A = layer.reslora_A if chain.links.shortcut == "is" else chain.layers[j].reslora_A
                v = v + xs[chain.layers[j].name] @ A.T
            vs[layer.name] = v.detach()
    return xs, vs


def solved(x, v, A, ridge, affine=False, others=()):
    """The normal equations in NumPy; affine by one more column that the ridge leaves alone."""
    x, v, A, *others = (t.detach().numpy() for t in (x, v, A, *others))
    center = x.mean(0) if affine else np.zeros(x.shape[1])
    mean = v.mean(0) if affine else np.zeros(v.shape[1])
    x, v = x - center, v - mean
    gram = x.T @ x
    penalty = ridge * np.trace(gram) / len(x) * np.eye(len(gram))
    products = np.stack([(x @ own.T).ravel() for own in (A, *others)], 1)
    held = 1e-3 * np.diag((products**2).sum(0))
    factors = np.linalg.solve(products.T @ products + held, products.T @ v.ravel() + held[:, 0])
    anchor = np.tensordot(factors, np.stack([A, *others]), 1)
    fitted = np.linalg.solve(gram + penalty, x.T @ v + penalty @ anchor.T).T
    return fitted, mean - fitted @ center


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_the_fit_is_the_solution_of_the_normal_equations(res_mode, pre_num, ridge):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    batches = [rows(seed=1), rows(seed=2)]
    result = fit_layers(model, batches, ridge=ridge)
    x, v = seen(model, batches)
    assert set(fits(model)) == set(result.residuals) == {f"layers.{n}.lin" for n in (1, 2, 3)}
    for n in (1, 2, 3):
        layer = model.layers[n].lin
        fit = fits(model)[layer.name]
        reached = layer.chain.links.reached(n) if res_mode == "ms" else []
        others = [model.layers[j].lin.reslora_A for j in reached]
        own = (x[layer.name], v[layer.name], layer.reslora_A)
        want, _ = solved(*own, ridge, others=others)
        np.testing.assert_allclose(fit.A.numpy(), want, rtol=1e-9, atol=1e-11)
        error = v[layer.name] - x[layer.name] @ fit.A.T
        relative = (error.square().sum() / v[layer.name].square().sum()).sqrt()
        assert fit.residual == pytest.approx(relative.item(), rel=1e-6)
        assert fit.rows == result.rows == 80


def test_an_affine_fit_has_an_offset_where_there_is_a_bias():
    model = adapted(res_mode="is")
    batches = [rows() + 2]
    fit_layers(model, batches, ridge=1e-3, affine=True)
    x, v = seen(model, batches)
    fit = fits(model)["layers.2.lin"]
    layer = model.layers[2].lin
    want, offset = solved(x[layer.name], v[layer.name], layer.reslora_A, 1e-3, affine=True)
    np.testing.assert_allclose(fit.affine_A.numpy(), want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(fit.offset.numpy(), offset, rtol=1e-8, atol=1e-10)
    assert fit.affine_residual < fit.residual


def test_an_affine_merge_changes_the_bias_and_gives_it_back():
    # Without a nonlinearity, the smaller residual is the smaller error of the output.
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model = adapted(base, target_modules=r"\d", res_mode="is")
    batches = [rows() + 2]
    want = model(batches[0])
    state = copy.deepcopy(model.state_dict())
    fit_layers(model, batches, ridge=1e-6)
    linear = merge_report(model, batches).output_error
    fit_layers(model, batches, ridge=1e-6, affine=True)
    report = merge(model, verify=batches)
    assert report.output_error < linear
    assert not torch.equal(state["1.base_layer.bias"], model[1].bias)
    got = (model(batches[0]) - want).square().sum().sqrt() / want.square().sum().sqrt()
    assert report.output_error == pytest.approx(got.item(), rel=1e-6)
    unmerge(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_an_affine_fit_without_any_bias_is_refused():
    model = adapted(Net(bias=False).double(), res_mode="is")
    with pytest.raises(ValueError, match="affine needs layers with a bias"):
        calibrate(model, [rows()], affine=True)


# ---- padding


def padded_llama():
    model = adapted(
        tiny_llama(pad_token_id=0).double(), 0.2, target_modules="all-linear", res_mode="is"
    )
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:], mask[1, 4:] = 0, 0
    ids[mask == 0] = 0
    return model, ids, mask


def test_padding_is_left_out_of_the_fit():
    model, ids, mask = padded_llama()
    fit_layers(model, [{"input_ids": ids, "attention_mask": mask}])
    masked = fits(model)
    alone = [{"input_ids": ids[i : i + 1, : int(mask[i].sum())]} for i in range(3)]
    fit_layers(model, alone)
    for name, fit in fits(model).items():
        assert fit.rows == masked[name].rows == int(mask.sum())
        torch.testing.assert_close(fit.A, masked[name].A, rtol=1e-6, atol=1e-8)


def test_padding_without_a_mask_is_refused_and_earlier_fits_stay():
    model, ids, mask = padded_llama()
    calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    before = fits(model)
    with pytest.raises(ValueError, match="2 of 3 rows of input_ids that begin or end with pad_"):
        calibrate(model, [{"input_ids": ids}])
    assert fits(model) is before


def padded_batch():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


class Windows(nn.Module):
    """Layers that see the tokens as they are, then layers that see one token more."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 6)
        self.near, self.far = Net(depth=3), Net(depth=3)

    def forward(self, input_ids, attention_mask):
        x = self.near(self.embedding(input_ids))
        return self.far(torch.cat([x, x[:, :1]], dim=1))


def test_padding_of_layers_with_other_rows_is_reported():
    model = adapted(Windows().double(), res_mode="is")
    with pytest.warns(UserWarning, match=r"the rows of 2 layers have another shape.*\(far\."):
        fit_layers(model, [padded_batch()])
    assert {name: fit.rows for name, fit in fits(model).items()} == {
        "near.layers.1.lin": 11,
        "near.layers.2.lin": 11,
        "far.layers.1.lin": 16,
        "far.layers.2.lin": 16,
    }


def test_layers_with_other_rows_that_merge_exactly_are_left_alone():
    model = adapted(tiny_bert(), 0.2, target_modules=["query", "pooler.dense"], res_mode="is")
    with pytest.warns(UserWarning, match="fewer rows than they have features") as caught:
        fit_layers(model, [padded_batch()])
    assert len(caught) == 1
    assert {fit.rows for fit in fits(model).values()} == {11}


# ---- memory


def test_layers_above_the_limit_are_fitted_in_groups_over_passes():
    model = adapted(tiny_llama(4), 0.2, target_modules="all-linear", res_mode="ms", pre_num=2)
    batches = [{"input_ids": tokens()} for _ in range(3)]
    at_once = fit_layers(model, batches)
    want = fits(model)
    in_groups = fit_layers(model, batches, max_cov_bytes=at_once.peak_bytes // 3)
    assert in_groups.passes > 2 > at_once.passes
    assert in_groups.peak_bytes <= at_once.peak_bytes // 3
    for name, fit in fits(model).items():
        torch.testing.assert_close(fit.A, want[name].A)
    with pytest.raises(ValueError, match="data that can be read once"):
        fit_layers(model, iter(batches), max_cov_bytes=at_once.peak_bytes // 3)


def test_layers_that_read_one_tensor_share_its_covariance():
    model = adapted(tiny_llama(2), 0.2, target_modules=["q_proj", "k_proj", "v_proj"])
    shared = fit_layers(model, [tokens()]).peak_bytes
    # One layer of each kind is fitted: in = 16, r = 2.
    assert shared == 8 * (16 * 17 + 3 * 2 * 17)


def test_a_layer_alone_above_the_limit_is_fitted_from_rows_on_disk():
    model = adapted(res_mode="is")
    batches = [rows(200, seed) for seed in range(3)]
    fit_layers(model, batches)
    want = fits(model)
    result = fit_layers(model, batches, max_cov_bytes=200)
    assert result.row_file_bytes == 3 * 600 * 6 * 4 and result.solver_steps > 0
    assert "temporary files" in str(result)
    for name, fit in fits(model).items():
        torch.testing.assert_close(fit.A, want[name].A, rtol=1e-4, atol=1e-5)
        assert fit.residual == pytest.approx(want[name].residual, rel=1e-3)


def test_kept_covariances_are_solved_again_with_another_ridge():
    model = adapted(res_mode="is")
    fit_layers(model, [rows()], keep_covariances=True)
    again = fit_layers(model, ridge=0.5)
    got = fits(model)["layers.3.lin"].A
    want = fit_layers(model, [rows()], ridge=0.5)
    assert again.residuals == pytest.approx(want.residuals)
    torch.testing.assert_close(got, fits(model)["layers.3.lin"].A)
    with pytest.raises(ValueError, match="needs kept covariances"):
        fit_layers(model)


# ---- what is left alone and what is refused


@pytest.mark.parametrize("res_mode", ["none", "bs"])
def test_layers_that_merge_exactly_are_not_fitted(res_mode):
    model = adapted(res_mode=res_mode)
    assert "nothing to fit" in str(calibrate(model, [rows()])) and not fits(model)
    assert {entry.rule for entry in merge(model).layers} == {"exact"}


def test_calibrating_leaves_mode_norms_gradients_and_links_alone():
    model = adapted(res_mode="is", lora_dropout=0.5)
    model(rows()).square().sum().backward()
    layer = model.layers[2].lin
    norms, grad = layer.norms.clone(), layer.reslora_A.grad.clone()
    model.layers[1].eval()
    calibrate(model, [rows()])
    assert model.training and not model.layers[1].training
    assert torch.equal(layer.norms, norms) and torch.equal(layer.reslora_A.grad, grad)
    assert layer.observer is None


def test_fits_of_a_changed_adapter_are_refused():
    model = adapted(res_mode="is")
    calibrate(model, [rows()])
    with torch.no_grad():
        model.layers[1].lin.reslora_B.add_(0.1)
    for call in (
        lambda: merge(model),
        lambda: merge(model, "lsq"),
        lambda: merge_report(model, []),
    ):
        with pytest.raises(ValueError, match="fits made before it changed"):
            call()
    calibrate(model, [])
    with pytest.warns(UserWarning, match="rule 'weight'"):
        assert merge(model).rule == "weight"


def test_few_rows_are_a_warning():
    with pytest.warns(UserWarning, match="3 layers saw fewer rows than they have features"):
        calibrate(adapted(res_mode="is"), [rows(4)])


def test_activations_that_are_not_finite_are_refused():
    model = adapted(res_mode="is")
    calibrate(model, [rows()])
    before = fits(model)
    bad = rows()
    bad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"must be finite.*layers\.1\.lin"):
        calibrate(model, [bad])
    assert fits(model) is before


class Skipping(Net):
    """Leaves its last block out."""

    def forward(self, x):
        for layer in list(self.layers)[:3]:
            x = layer(x)
        return x


def test_a_layer_that_no_batch_reaches_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got none for layer layers\.3\.lin"):
        calibrate(adapted(Skipping().double(), res_mode="is"), [rows()])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], None),
        (iter([]), "must hold a batch"),
        ("text", "must be batches"),
        (3, "must be batches"),
    ],
)
def test_data_that_is_none(data, match):
    model = adapted(res_mode="is")
    if match is None:
        assert not calibrate(model, data).residuals
        return
    with pytest.raises(ValueError, match=match):
        calibrate(model, data)


@pytest.mark.parametrize("ridge", [0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_no_ridge_is_refused(ridge):
    with pytest.raises(ValueError, match="ridge must be"):
        calibrate(adapted(res_mode="is"), [rows()], ridge=ridge)


def test_a_merged_or_plain_model_is_refused():
    model = adapted(res_mode="none")
    merge(model)
    with pytest.raises(ValueError, match="must not be merged"):
        calibrate(model, [rows()])
    with pytest.raises(ValueError, match="must be adapted"):
        calibrate(nn.Linear(2, 2), [rows()])


def test_a_calibrated_model_can_be_copied_and_pickled():
    model = adapted(res_mode="is")
    calibrate(model, [rows()], keep_covariances=True)
    want = merge_report(model, [rows()]).output_error
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert merge(twin, verify=[rows()]).output_error == pytest.approx(want)
        assert twin.layers[1].lin.is_merged and not model.layers[1].lin.is_merged


# ---- the merge that it is for


def test_data_given_to_merge_means_lsq_and_beats_the_rules_of_the_paper():
    model = randomize(
        inject(tiny_llama(4), ResLoraConfig(r=2, target_modules="all-linear", res_mode="is")), 0.05
    )
    model.train()
    model(tokens(4, 16))
    batches = [tokens(8, 16) for _ in range(8)]
    errors = {rule: merge_report(model, batches, rule).kl for rule in ("input", "weight")}
    report = merge(model, data=batches, verify=batches)
    assert {entry.rule for entry in report.layers} == {"exact", "lsq"} and report.rule == "lsq"
    assert report.kl < 0.8 * min(errors.values())


@pytest.mark.parametrize("method", ["input", "weight", "factored", "exact"])
def test_data_for_a_rule_without_data_is_refused(method):
    model = adapted(res_mode="is")
    with pytest.raises(ValueError, match="data serves the rule 'lsq'"):
        merge(model, method, data=[rows()])


def test_lsq_without_data_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got none for layer layers\.1\.lin"):
        merge(adapted(res_mode="is"), "lsq")
    with pytest.raises(ValueError, match="refine_steps needs batches"):
        merge(adapted(res_mode="is"), refine_steps=3)


def test_bf16_models_are_calibrated_in_fp32():
    model = adapted(Net().to(torch.bfloat16), res_mode="is")
    fit_layers(model, [rows().to(torch.bfloat16)])
    assert {fit.A.dtype for fit in fits(model).values()} == {torch.float32}
    assert merge(model).layers[1].rule == "lsq" and trained(model)


# ---- batches in every form, and what is left behind


@pytest.mark.parametrize("form", ["tensor", "tuple", "none", "4d"])
def test_padding_is_noticed_in_every_form_of_a_batch(form):
    model, ids, mask = padded_llama()
    batch = {
        "tensor": ids,
        "tuple": (ids,),
        "none": {"input_ids": ids, "attention_mask": None},
        "4d": {"input_ids": ids, "attention_mask": mask[:, None, None, :].bool()},
    }[form]
    with pytest.raises(ValueError, match="must say where its padding is"):
        calibrate(model, [batch])


def test_encoder_and_decoder_rows_are_told_apart_or_refused():
    model = adapted(tiny_t5(), 0.2, target_modules=["q", "v"], res_mode="is")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 2:] = 0
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens()}
    with pytest.raises(ValueError, match="must differ in length"):
        fit_layers(model, [batch])
    with pytest.raises(ValueError, match="must differ in length"):
        merge_report(model, [batch], "weight")
    fit_layers(model, [batch | {"decoder_input_ids": 1 + tokens(2, 9) % 20}])
    found = {name.split(".")[0]: fit.rows for name, fit in fits(model).items()}
    assert found["encoder"] == 9 and found["decoder"] in (9, 18)


def test_padding_of_a_decoder_is_told_by_its_labels_or_refused():
    """A collator for seq2seq gives labels with -100, and no decoder_attention_mask."""
    model = adapted(tiny_t5(), 0.2, target_modules=["q", "v"], res_mode="is")
    labels = 1 + tokens(2, 9) % 20
    labels[1, 4:] = -100
    batch = {"input_ids": 1 + tokens() % 20, "labels": labels}

    def decoder_rows(batch):
        fit_layers(model, [batch])
        own = {name: fit.rows for name, fit in fits(model).items() if "SelfAttention" in name}
        return {rows for name, rows in own.items() if name.startswith("decoder")}

    assert decoder_rows(batch) == {9 + 4}
    mask = (labels != -100).long()
    mask[1, 4] = 1
    assert decoder_rows(batch | {"decoder_attention_mask": mask}) == {9 + 5}
    padded = torch.where(labels == -100, model.config.pad_token_id, labels)
    with pytest.raises(ValueError, match="rows of decoder_input_ids"):
        fit_layers(model, [{"input_ids": batch["input_ids"], "decoder_input_ids": padded}])


def test_a_mask_of_other_values_is_refused():
    model, ids, mask = padded_llama()
    with pytest.raises(ValueError, match="must hold 1 for tokens and 0 for padding; got values"):
        calibrate(model, [{"input_ids": ids, "attention_mask": (1 - mask) * -1e9}])


def test_a_limit_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="whole number of bytes; got '4GB'"):
        calibrate(adapted(res_mode="is"), [rows()], max_cov_bytes="4GB")


def test_solving_again_leaves_refined_fits_behind():
    model = adapted(res_mode="is")
    batches = [rows()] * 5  # measured on what is trained on: small steps come nearer for certain
    fit_layers(model, batches, keep_covariances=True)
    want = {name: fit.A for name, fit in fits(model).items()}
    refine(model, batches, 3, lr=1e-3)
    assert len(fits(model)) == 4
    fit_layers(model)
    assert set(fits(model)) == set(want)
    assert all(torch.equal(fits(model)[name].A, A) for name, A in want.items())


def test_a_refused_merge_gives_the_earlier_fits_back():
    model = adapted(res_mode="is")
    calibrate(model, [rows()])
    before = fits(model)
    with pytest.raises(ValueError, match="max_error"):
        merge(model, data=[rows(seed=4)], verify=[rows(seed=5)], max_error=1e-12)
    assert fits(model) is before
    other = adapted(res_mode="is")
    with pytest.raises(ValueError, match="max_error"):
        merge(other, data=[rows()], verify=[rows()], max_error=1e-12)
    assert injection_of(other, "test").calibrated is None


def test_a_disabled_adapter_is_not_calibrated():
    model = adapted(res_mode="is")
    with disable_adapter(model), pytest.raises(ValueError, match=r"must be enabled; got layers\."):
        calibrate(model, [rows()])
    with disable_adapter(model), pytest.raises(ValueError, match="must be enabled"):
        merge_report(model, [rows()], "weight")
