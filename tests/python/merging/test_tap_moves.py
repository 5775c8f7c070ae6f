"""Taps moved to the layers that they read: where it helps, what it keeps, what follows from it."""

import peft
import pytest
import torch
from models import LINKED, adapted
from torch import nn

from reslora import (
    calibrate,
    export_lora,
    finish,
    load,
    merge,
    merge_report,
    refine,
    save_pretrained,
    unmerge,
)
from reslora.injection.adapted import injection_of

F64 = {"dtype": torch.float64}


class Stream(nn.Module):
    """Blocks that add to one stream, and read what no block changes: sum of out(tanh(mix(x))).

    A tap's term adds to the output what it would add one block later, so moving it is exact.
    """

    def __init__(self, width: int = 6, depth: int = 4) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        blocks = zip(self.mixes, self.layers, strict=True)
        return sum(out(torch.tanh(3 * mix(x))) for mix, out in blocks)


def turning_layers(depth: int = 4) -> nn.Module:
    """Return linear layers one after the other, each of which turns its input by 90 degrees.

    What a tap reads is a linear function of what its layer reads, so the plain fit is exact. Moved,
    its term T would pass the layers between, which turn it: it lacks by |WT - T|, 1.4 times |T|.
    """
    layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(depth))).double()
    turn = torch.kron(torch.eye(3), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    for layer in layers:
        layer.weight.data.copy_(turn)
    return layers


def stream(**options):
    torch.manual_seed(0)
    return adapted(Stream().double(), target_modules=r"layers\.\d+", **options)


def batches(count=4, rows=60):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 6, generator=generator, **F64) for _ in range(count)]


def fits(model):
    return injection_of(model, "test").calibrated.fits


def error(model, data):
    """Return the relative error of the merged model's outputs."""
    with torch.no_grad():
        wanted = model(data)
        merge(model)
        got = model(data)
        unmerge(model)
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_layers_that_add_to_one_stream_lose_less(res_mode, pre_num):
    model = stream(res_mode=res_mode, pre_num=pre_num)
    data, held_out = batches(), batches(6)[5]
    plain = calibrate(model, data, move_taps=False)
    before = error(model, held_out)
    result = calibrate(model, data)
    assert plain.moved == [] and len(result.moved) == 1
    assert result.distance < result.distance_before
    # Half of what the taps bring is exact, and the fit of the other half lacks half as much.
    assert error(model, held_out) == pytest.approx(before / 2, rel=1e-6)
    assert f"taps moved to the layers that they read in 1 chains ({result.moved[0]})" in str(result)


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_layers_in_a_row_keep_their_taps(res_mode, pre_num):
    # Adapters are small beside the turn, so that no layer loses a part of what it reads.
    model = adapted(turning_layers(), 0.1, target_modules=r"\d", res_mode=res_mode, pre_num=pre_num)
    result = calibrate(model, batches())
    assert result.moved == []
    assert all(fit.B is None and len(fit.A) == 2 for fit in fits(model).values())


def test_output_that_cannot_be_compared_moves_nothing():
    class Silent(Stream):
        def forward(self, x):
            super().forward(x)
            return {"rows": len(x)}

    model = adapted(Silent().double(), target_modules=r"layers\.\d+", res_mode="is")
    result = calibrate(model, batches())
    assert result.moved == [] and len(result.residuals) == 3


def test_outputs_that_are_not_finite_move_nothing():
    class Overflowing(Stream):
        def forward(self, x):
            return super().forward(x) * float("inf")

    torch.manual_seed(0)
    model = adapted(Overflowing().double(), target_modules=r"layers\.\d+", res_mode="is")
    result = calibrate(model, batches())
    assert result.moved == [] and len(result.residuals) == 3
    assert all(fit.B is None for fit in fits(model).values())


def test_an_output_that_changes_its_shape_is_refused_by_name():
    class Growing(Stream):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x).repeat(self.calls, 1)

    model = adapted(Growing().double(), target_modules=r"layers\.\d+", res_mode="is")
    calibrate(model, batches())
    with pytest.raises(ValueError, match=r"^\[refine\] the model's output must have one shape"):
        refine(model, batches(40), 2)


def test_moved_fits_are_saved_exported_and_reported(tmp_path):
    model = stream(res_mode="is")
    data = batches()
    calibrate(model, data)
    held_out = batches(6)[5]
    report = merge_report(model, [held_out])
    assert {layer.rule for layer in report.layers} == {"lsq"}
    save_pretrained(model, tmp_path / "adapter", statistics=True)
    torch.manual_seed(0)
    again = load(Stream().double(), tmp_path / "adapter")
    for name, fit in fits(model).items():
        assert torch.equal(fits(again)[name].A, fit.A) and torch.equal(fits(again)[name].B, fit.B)
    with torch.no_grad():
        merge(model)
        merged = model(held_out)
    export_lora(again, tmp_path / "lora")
    torch.manual_seed(0)
    reader = peft.PeftModel.from_pretrained(
        Stream().double(), tmp_path / "lora", autocast_adapter_dtype=False
    )
    torch.testing.assert_close(reader(held_out), merged, rtol=1e-5, atol=1e-6)


def test_refining_starts_from_moved_taps():
    model = stream(res_mode="is")
    calibrate(model, batches())
    ranks = {name: len(fit.A) for name, fit in fits(model).items()}
    result = refine(model, batches(40), 30)
    assert result.loss_after < result.loss_before
    assert {name: len(fit.A) for name, fit in fits(model).items()} == ranks
    assert max(ranks.values()) == 4


def test_finish_takes_the_fits_without_moved_taps():
    model, other = stream(res_mode="is"), stream(res_mode="is")
    calibrate(model, batches())
    calibrate(other, batches(), move_taps=False)
    finish(model)
    finish(other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_finish_refuses_refined_fits_of_twice_the_rank():
    model = stream(res_mode="is")
    calibrate(model, batches())
    refine(model, batches(8), 4, lr=1e-6)
    with pytest.raises(ValueError, match=r"rank of the adapter, r = 2; got one of rank 4"):
        finish(model)
    assert injection_of(model, "test").config.res_mode == "is"


def test_solving_again_moves_the_same_taps():
    model = stream(res_mode="ms", pre_num=2)
    moved = calibrate(model, batches(), keep_covariances=True).moved
    before = fits(model)
    again = calibrate(model)
    assert again.moved == moved and "taps moved" in str(again)
    for name, fit in fits(model).items():
        torch.testing.assert_close(fit.A, before[name].A)
        torch.testing.assert_close(fit.B, before[name].B)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_error_while_moving_leaves_the_earlier_fits(kind):
    class Failing(Stream):
        calls, most = 0, 10**9

        def forward(self, x):
            self.calls += 1
            if self.calls > self.most:
                raise kind("out of luck")
            return super().forward(x)

    model = adapted(Failing().double(), target_modules=r"layers\.\d+", res_mode="is")
    calibrate(model, batches())
    before = injection_of(model, "test").calibrated
    model.calls, model.most = 0, 6  # four batches are read, and two forwards of the third compared
    with pytest.raises(kind, match="out of luck"):
        calibrate(model, batches())
    assert injection_of(model, "test").calibrated is before


def test_output_of_changing_shape_moves_nothing():
    class Changing(Stream):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)[: self.calls % 3 + 1]

    model = adapted(Changing().double(), target_modules=r"layers\.\d+", res_mode="is")
    assert calibrate(model, batches()).moved == []


def test_moving_changes_no_weight_and_no_mode():
    model = stream(res_mode="is").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    calibrate(model, batches())
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
