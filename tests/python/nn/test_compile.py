"""torch.compile of an adapted model: one graph, equal values, no growing number of recompiles."""

import copy

import pytest
import torch
from models import (
    LINKED,
    NON_REENTRANT,
    Net,
    adapted,
    gradients,
    tiny_llama,
    tokens,
    trained,
)
from torch._dynamo.utils import counters

pytestmark = pytest.mark.usefixtures("fresh_compiler")
FLAG = "skip_fwd_side_effects_in_bwd_under_checkpoint"


def compiled(model, fullgraph=True):
    counters.clear()
    return torch.compile(model, fullgraph=fullgraph, backend="aot_eager")


def graphs():
    return counters["stats"]["unique_graphs"]


def gradients_of(call, model, x):
    return torch.autograd.grad(call(x).square().sum(), trained(model))


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("none", 1), ("bs", 2)])
def test_a_whole_model_is_one_graph(res_mode, pre_num):
    model = adapted(Net(depth=3), res_mode=res_mode, pre_num=pre_num)
    other = copy.deepcopy(model)
    call = compiled(model)
    for _ in range(12):  # past the recompile limit of 8
        x = torch.randn(3, 6)
        assert_equal([call(x)], [other(x)])
        assert_equal(gradients_of(call, model, x), gradients(other, x))
    assert graphs() == 1
    for block, reference in zip(model.layers, other.layers, strict=True):
        if block.lin.norms is not None:
            assert torch.equal(block.lin.norms, reference.lin.norms)
            assert block.lin.norm_count.item() == 24


def test_modes_change_and_come_back():
    model = adapted(Net(depth=3))
    other = copy.deepcopy(model)
    call, x = compiled(model), torch.randn(3, 6)
    for _ in range(3):
        assert_equal(gradients_of(call, model.train(), x), gradients(other, x))
        with torch.no_grad():
            assert_equal([call(x)], [other(x)])
            assert_equal([model.eval() and call(x)], [other(x)])
    assert model.layers[1].lin.norm_count.item() == other.layers[1].lin.norm_count.item() == 3
    assert model.layers[1].lin.was_linked_compiled


def test_the_default_backend_gives_equal_gradients():
    model = adapted(Net(depth=3), res_mode="ms", pre_num=-1)
    x = torch.randn(3, 6)
    want = gradients(model, x)
    assert_equal(gradients_of(torch.compile(model, fullgraph=True), model, x), want)


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_checkpointing_inside_compile_is_exact(res_mode, pre_num):
    model = adapted(Net(depth=3), res_mode=res_mode, pre_num=pre_num)
    x = torch.randn(3, 6)
    want = gradients(model, x)
    model.checkpointing = NON_REENTRANT
    call = compiled(model)
    for step in range(3):
        assert_equal(gradients_of(call, model, x), want)
        assert model.layers[1].lin.norm_count.item() == 2 + step
    assert graphs() == 1


def test_norms_in_compiled_checkpoints_with_the_default_backend():
    model = adapted(Net(depth=3), res_mode="is")
    x = torch.randn(3, 6)
    want = gradients(model, x)
    model.checkpointing = NON_REENTRANT
    assert_equal(gradients_of(torch.compile(model, fullgraph=True), model, x), want)
    assert model.layers[1].lin.norm_count.item() == 2


def test_dropout_in_compiled_checkpoints_uses_the_same_masks():
    model = adapted(Net(depth=2).double(), res_mode="is", lora_dropout=0.5)
    first, last = (block.lin for block in model.layers)
    torch.nn.init.zeros_(first.reslora_B)  # so that the last layer's input is known
    model.checkpointing = NON_REENTRANT
    x = torch.randn(8, 6, dtype=torch.float64)
    total = torch.atanh(compiled(model)(x)).sum()
    (gradient,) = torch.autograd.grad(total, [last.reslora_B])
    # The sum of s S B^T is <B, dB>: S, recomputed with other masks, would not fit the forward.
    low_rank = total - last.base_layer(torch.tanh(first.base_layer(x))).sum()
    torch.testing.assert_close((gradient * last.reslora_B).sum(), low_rank)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_checkpointing_inside_compile_without_the_flag_is_refused(fullgraph, fresh_compiler):
    model = adapted(Net(depth=3))
    setattr(fresh_compiler, FLAG, False)  # `inject` has set it
    model.checkpointing = NON_REENTRANT
    call = compiled(model, fullgraph)
    with pytest.raises(Exception, match=FLAG):
        gradients_of(call, model, torch.randn(3, 6))


def test_compiled_blocks_share_taps_through_an_eager_root():
    model = adapted(Net(depth=3), res_mode="is")
    x = torch.randn(3, 6)
    want = gradients(model, x)
    counters.clear()
    for block in model.layers:
        block.compile(backend="aot_eager")
    assert_equal(gradients(model, x), want)
    assert graphs() > 0
    model.checkpointing = NON_REENTRANT
    with pytest.raises(RuntimeError, match="left no record"):
        gradients(model, x)


def test_a_compiled_causal_model_equals_the_eager_one():
    model = adapted(tiny_llama(2), 0.3, target_modules="all-linear").train()
    ids = tokens()
    want = torch.autograd.grad(model(ids).logits.square().sum(), trained(model))
    call = compiled(model)
    for _ in range(2):
        got = torch.autograd.grad(call(ids).logits.square().sum(), trained(model))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert graphs() == 1


def test_export_of_an_adapted_model():
    model = adapted(Net(depth=3), res_mode="ms", pre_num=2).eval()
    x = torch.randn(3, 6)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
