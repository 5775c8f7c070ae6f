"""Statistics beside an adapter: written, read back to the bit, bound to the adapter's values."""

import copy
import shutil

import pytest
import safetensors
import safetensors.torch
import torch
from models import Net, adapted, randomize, tiny_llama, tokens

from reslora import calibrate, load, merge, refine, save_pretrained
from reslora.files.folders import STATISTICS_NAME
from reslora.injection.adapted import find_layers, injection_of
from reslora.merging.planning import make_plan

DOUBLE = {"dtype": torch.float64}
FIT = ("A", "B", "affine_A", "offset", "alpha_star", "residual", "affine_residual", "rows",
       "refine_steps")  # fmt: skip


def x_of(seed=0, rows=20):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def with_norms(steps=3, **options):
    model = adapted(**options)
    for seed in range(steps):
        model(x_of(seed))
    return model


def with_fits(model=None, **options):
    model = with_norms() if model is None else model
    calibrate(model, [x_of(7), x_of(8)], **options)
    return model


def base_of(model):
    """A plain Net with the base weights of an adapted one."""
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    base = Net().double()
    base.load_state_dict({k: v for k, v in state.items() if "reslora" not in k})
    return base


def fits_of(model):
    calibrated = injection_of(model, "test").calibrated
    return {} if calibrated is None else calibrated.fits


def same(a, b):
    return a is b if a is None or b is None else torch.equal(a, b)


def assert_same_fits(got, wanted):
    assert got.keys() == wanted.keys() and got
    for name, fit in wanted.items():
        for key in FIT:
            mine, other = getattr(got[name], key), getattr(fit, key)
            is_same = same(mine, other) if key in FIT[:4] else mine == other
            assert is_same, (name, key)


def state_of(model):
    norms = [(layer.norms, layer.norm_count) for layer in find_layers(model)]
    return copy.deepcopy((model.state_dict(), norms)), fits_of(model)


def assert_unchanged(model, before):
    (state, norms), fits = before
    now = model.state_dict()
    assert list(now) == list(state) and all(torch.equal(now[k], v) for k, v in state.items())
    layers = find_layers(model)
    got = [part for layer in layers for part in (layer.norms, layer.norm_count)]
    assert all(map(same, got, [part for pair in norms for part in pair]))
    assert not layers or fits_of(model) is fits or fits_of(model) == fits


# ---- What comes back


@pytest.mark.parametrize("options", [{"res_mode": "is"}, {"res_mode": "ms", "pre_num": -1}])
def test_norms_and_fits_come_back_to_the_bit(tmp_path, options):
    model = with_fits(with_norms(**options, norm_window=2))
    save_pretrained(model, tmp_path, statistics=True)
    other = load(base_of(model), tmp_path)
    for mine, layer in zip(find_layers(other), find_layers(model), strict=True):
        assert torch.equal(mine.norms, layer.norms) and mine.norms.abs().sum() > 0
        assert torch.equal(mine.norm_count, layer.norm_count) and mine.norm_count == 3
    assert_same_fits(fits_of(other), fits_of(model))
    assert set(fits_of(other)) == {f"layers.{n}.lin" for n in (1, 2, 3)}


def test_affine_and_refined_fits_come_back(tmp_path):
    for n, prepare in enumerate([
        lambda: with_fits(affine=True),
        lambda: refined(with_fits()),
    ]):  # fmt: skip
        model = prepare()
        save_pretrained(model, tmp_path / str(n), statistics=True)
        other = load(base_of(model), tmp_path / str(n))
        assert_same_fits(fits_of(other), fits_of(model))
        merge(model)
        merge(other)
        assert torch.equal(other(x_of(3)), model(x_of(3)))


def refined(model):
    refine(model, [x_of(seed) for seed in range(4)], 2)
    assert all(fit.B is not None for fit in fits_of(model).values())
    return model


@pytest.mark.parametrize("is_fitted", [True, False])
def test_the_default_merge_uses_what_came_back(tmp_path, is_fitted):
    model = with_fits() if is_fitted else with_norms()
    save_pretrained(model, tmp_path, statistics=True)
    other = load(base_of(model), tmp_path)
    report, want = merge(other), merge(model)
    rule = "lsq" if is_fitted else "projected"
    assert [entry.rule for entry in report.layers[1:]] == [rule] * 3
    assert [entry.alpha_star for entry in report.layers] == [e.alpha_star for e in want.layers]
    assert torch.equal(other(x_of(3)), model(x_of(3)))


def test_statistics_come_back_into_an_adapted_model(tmp_path):
    model = with_fits()
    save_pretrained(model, tmp_path, statistics=True)
    other = randomize(with_norms(1))
    load(other, tmp_path)
    assert_same_fits(fits_of(other), fits_of(model))
    assert all(layer.norm_count == 3 for layer in find_layers(other))


def test_loading_without_statistics_forgets_earlier_ones(tmp_path):
    save_pretrained(with_norms(), tmp_path)
    other = with_fits()
    load(other, tmp_path)
    assert not fits_of(other) and all(not layer.norm_count for layer in find_layers(other))


def test_training_goes_on_after_loading(tmp_path):
    model = with_norms()
    save_pretrained(model, tmp_path, statistics=True)
    other = load(base_of(model), tmp_path).train()
    for both in (model, other):
        both(x_of(9))
    for mine, layer in zip(find_layers(other), find_layers(model), strict=True):
        assert torch.equal(mine.norms, layer.norms) and mine.norm_count == 4


def test_statistics_serve_a_model_of_another_dtype(tmp_path):
    model = with_fits()
    save_pretrained(model, tmp_path / "a", statistics=True)
    other = load(base_of(model).float(), tmp_path / "a")
    save_pretrained(other, tmp_path / "b", statistics=True)
    load(base_of(model).float(), tmp_path / "b")
    assert {entry.rule for entry in merge(other).layers[1:]} == {"lsq"}
    merge(model)
    torch.testing.assert_close(other(x_of(3).float()).double(), model(x_of(3)), rtol=0, atol=1e-5)


def test_a_merged_model_saves_its_statistics(tmp_path):
    model = with_fits()
    base = base_of(model)
    merge(model)
    save_pretrained(model, tmp_path, statistics=True)
    other = load(base, tmp_path)
    merge(other)
    assert torch.equal(other(x_of(3)), model(x_of(3)))


# ---- The file


def test_the_safetensors_package_reads_statistics(tmp_path):
    model = with_fits()
    save_pretrained(model, tmp_path, statistics=True)
    tensors = safetensors.torch.load_file(tmp_path / STATISTICS_NAME)
    names = {f"layers.{n}.lin.{part}" for n in range(4) for part in ("norms", "norm_count")}
    names |= {f"layers.{n}.lin.{part}" for n in (1, 2, 3) for part in ("fit_A", "fit", "products")}
    assert tensors.keys() == names
    layer, fit = find_layers(model)[2], fits_of(model)["layers.2.lin"]
    assert torch.equal(tensors["layers.2.lin.norms"], layer.norms)
    assert torch.equal(tensors["layers.2.lin.fit_A"], fit.A)
    numbers = [fit.alpha_star, fit.residual, fit.affine_residual, fit.rows, fit.refine_steps]
    assert tensors["layers.2.lin.fit"].tolist() == numbers and numbers[3:] == [40, 0]
    want = torch.stack([x_of(seed).norm() for seed in range(3)])
    first = tensors["layers.0.lin.norms"][0]
    torch.testing.assert_close(first[:3].double(), want, rtol=1e-6, atol=0)


def test_saving_again_writes_the_same_bytes(tmp_path):
    model = with_fits(keep_covariances=True)
    save_pretrained(model, tmp_path / "a", statistics="covariances")
    save_pretrained(load(base_of(model), tmp_path / "a"), tmp_path / "b", statistics="covariances")
    files = [(tmp_path / name / STATISTICS_NAME).read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("prepare", [adapted, lambda: adapted(res_mode="bs")])
def test_nothing_at_hand_writes_no_file(tmp_path, prepare):
    save_pretrained(prepare(), tmp_path, statistics=True)
    assert not (tmp_path / STATISTICS_NAME).exists()
    assert not fits_of(load(Net().double(), tmp_path))


@pytest.mark.parametrize("later", [False, True])
def test_an_old_file_does_not_stay(tmp_path, later):
    model = with_fits()
    save_pretrained(model, tmp_path, statistics=True)
    assert (tmp_path / STATISTICS_NAME).is_file()
    save_pretrained(adapted(), tmp_path, statistics=later)
    assert not (tmp_path / STATISTICS_NAME).exists()


@pytest.mark.parametrize("value", ["all", "", 2, None])
def test_other_values_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="statistics must be True, False or 'covariances'"):
        save_pretrained(with_norms(), tmp_path / "a", statistics=value)
    assert not (tmp_path / "a").exists()


# ---- Covariances


def solved(sums, A, ridge, alpha_star):
    """A' of the normal equations, (vx + lambda c A) (xx + lambda I)^-1, c held to 1 + alpha*."""
    eye, rows = torch.eye(sums["xx"].shape[0], **DOUBLE), float(sums["sums"][1])
    scale, square = ridge * sums["xx"].trace() / rows, ((A @ sums["xx"]) * A).sum()
    known, share = 1 + alpha_star, 64 / rows
    c = ((A * sums["vx"]).sum() + share * square * known) / (square * (1 + share))
    return torch.linalg.solve(sums["xx"] + scale * eye, sums["vx"] + scale * c * A, left=False)


def test_covariances_serve_another_ridge_without_data(tmp_path):
    model = with_fits(keep_covariances=True)
    save_pretrained(model, tmp_path, statistics="covariances")
    other = load(base_of(model), tmp_path)
    first = fits_of(other)
    for each in (other, model):
        calibrate(each, ridge=0.5)
    assert_same_fits(fits_of(other), fits_of(model))
    tensors = safetensors.torch.load_file(tmp_path / STATISTICS_NAME)
    plan = make_plan(injection_of(other, "test"), "input", "test", use_affine=False)
    alpha_star = {layer.name: sum(layer.alpha_star) for layer in plan.layers}
    for name, fit in fits_of(other).items():
        own = {part: tensors[f"{name}.{part}"] for part in ("xx", "vx", "sums")}
        A = other.get_submodule(name).reslora_A.detach()
        for solution, ridge in ((fit, 0.5), (first[name], 0.3)):
            wanted = solved(own, A, ridge, alpha_star[name])
            torch.testing.assert_close(solution.A, wanted, rtol=1e-9, atol=1e-12)
        assert fit.residual > first[name].residual and own["sums"][1] == 40
    x = torch.cat([find_input(model, x_of(seed)) for seed in (7, 8)])
    torch.testing.assert_close(tensors["layers.1.lin.xx"], x.T @ x)


def find_input(model, x):
    """What enters layer 1."""
    layer = model.layers[0].lin
    A, B = layer.reslora_A, layer.reslora_B
    return torch.tanh(layer.base_layer(x) + 1.5 * (x + x) @ A.T @ B.T).detach()


def test_layers_of_one_input_share_their_covariance(tmp_path):
    model = adapted(tiny_llama(), target_modules=["q_proj", "k_proj"], res_mode="is")
    calibrate(model, [{"input_ids": tokens(8, 8)}], keep_covariances=True)
    save_pretrained(model, tmp_path, statistics="covariances")
    keys = safetensors.torch.load_file(tmp_path / STATISTICS_NAME).keys()
    assert sum(key.endswith(".xx") for key in keys) == 2
    assert sum(key.endswith(".vx") for key in keys) == 4
    other = load(tiny_llama(), tmp_path)
    for each in (other, model):
        calibrate(each, ridge=0.1)
    assert_same_fits(fits_of(other), fits_of(model))


def test_covariances_are_written_on_request_only(tmp_path):
    model = with_fits(keep_covariances=True)
    save_pretrained(model, tmp_path, statistics=True)
    assert not any(k.endswith("x") for k in safetensors.torch.load_file(tmp_path / STATISTICS_NAME))
    with pytest.raises(ValueError, match="needs kept covariances"):
        calibrate(load(base_of(model), tmp_path), ridge=0.1)
    for prepare in (with_norms, with_fits):
        with pytest.raises(ValueError, match="needs kept covariances"):
            save_pretrained(prepare(), tmp_path / "new", statistics="covariances")
    assert not (tmp_path / "new").exists()


# ---- Refusals: one sentence, model and folder as they were


def test_stale_fits_are_refused(tmp_path):
    model = with_fits()
    save_pretrained(model, tmp_path, statistics=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.layers[2].lin.reslora_A[0, 0] += 1e-9
    with pytest.raises(ValueError, match="fits made before it changed") as caught:
        save_pretrained(model, tmp_path, statistics=True)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    calibrate(model, [])
    save_pretrained(model, tmp_path, statistics=True)
    assert not any("fit" in k for k in safetensors.torch.load_file(tmp_path / STATISTICS_NAME))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def rewrite(change, metadata=None):
    """Write tensors and metadata again, changed."""

    def damage(path):
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            values = file.metadata() | (metadata or {})
        change(tensors)
        safetensors.torch.save_file(tensors, path, values)

    return damage


def put(key, value):
    return rewrite(lambda tensors: tensors.update({key: value}))


def foreign(path):
    safetensors.torch.save_file({"layers.0.lin.norms": torch.ones(2, 3)}, path)


def of_another(path):
    other = path.parent.parent / "other"
    save_pretrained(with_fits(with_norms(2)), other, statistics=True)
    shutil.copyfile(other / STATISTICS_NAME, path)


NAME = "layers.2.lin"
DAMAGE = [
    (truncate, STATISTICS_NAME),
    (flip, STATISTICS_NAME),
    (foreign, "is no file of statistics"),
    (lambda path: path.write_bytes(b""), STATISTICS_NAME),
    (lambda path: path.write_bytes(b"\xff" * 99), STATISTICS_NAME),
    (rewrite(lambda t: None, {"reslora.statistics": "4"}), "format 1 or 2 or 3; got '4'"),
    (rewrite(lambda t: None, {"reslora.adapter_sum": "0"}), "got those of another one"),
    (rewrite(lambda t: None, {"reslora.shared_xx": "{"}), STATISTICS_NAME),
    (rewrite(lambda t: None, {"reslora.shared_xx": '{"layers.2.lin": "x"}'}), "x.xx"),
    (rewrite(lambda t: t.pop(f"{NAME}.fit")), f"{NAME}.fit"),
    (rewrite(lambda t: t.pop(f"{NAME}.norm_count")), f"{NAME}.norm_count"),
    (put("layers.9.lin.norms", torch.ones(2, 3)), "layers.9.lin"),
    (rewrite(lambda t: t.update({f"layers.9.lin.{k}": t[f"{NAME}.{k}"].clone()
                                 for k in ("norms", "norm_count")})), "checksum"),
    (put(f"{NAME}.extra", torch.ones(1)), "known tensors only"),
    (put("extra", torch.ones(1)), STATISTICS_NAME),
    (put(f"{NAME}.fit", torch.full((5,), float("nan"), **DOUBLE)), "must be finite"),
    (put(f"{NAME}.fit_A", torch.ones(2, 6, dtype=torch.int64)), "must be F32 or F64"),
    (put(f"{NAME}.fit_A", torch.ones(2, 5, **DOUBLE)), "checksum"),
    (put(f"{NAME}.fit_A", torch.full((2, 6), float("nan"), **DOUBLE)), "fit"),
    (put(f"{NAME}.norms", torch.ones(3, 4)), f"{NAME}.norms"),
    (put(f"{NAME}.norm_count", torch.tensor([-1])), "norm"),
]  # fmt: skip


def test_something_else_in_the_place_of_statistics_is_refused(tmp_path):
    save_pretrained(adapted(), tmp_path)
    (tmp_path / STATISTICS_NAME).mkdir()
    with pytest.raises(ValueError, match=rf"{STATISTICS_NAME}' must be a file, or not there"):
        load(Net().double(), tmp_path)


def test_statistics_of_another_save_are_left_out(tmp_path):
    model = with_fits()
    save_pretrained(model, tmp_path / "adapter", statistics=True)
    of_another(tmp_path / "adapter" / STATISTICS_NAME)
    with pytest.warns(UserWarning, match=r"was saved with other weights .* is left out"):
        read = load(base_of(model), tmp_path / "adapter")
    assert injection_of(read, "test").calibrated is None
    assert all(layer.norms is None for layer in find_layers(read))


@pytest.mark.parametrize("is_adapted", [False, True])
@pytest.mark.parametrize(("damage", "sentence"), DAMAGE)
def test_damaged_statistics_are_refused(tmp_path, damage, sentence, is_adapted):
    model = with_fits()
    save_pretrained(model, tmp_path / "adapter", statistics=True)
    target = with_fits(randomize(with_norms(1))) if is_adapted else base_of(model)
    before = state_of(target) if is_adapted else (copy.deepcopy((target.state_dict(), [])), {})
    damage(tmp_path / "adapter" / STATISTICS_NAME)
    with pytest.raises(ValueError, match=sentence) as caught:
        load(target, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert_unchanged(target, before)
