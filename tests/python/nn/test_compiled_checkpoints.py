"""Compiled blocks and checkpoints: what is compiled may hold a checkpoint, not the other way."""

import copy

import pytest
import torch
from models import Net, adapted, assert_equal, gradients, tiny_llama, tokens, trained, x_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from reslora.injection.adapted import find_layers

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(block):
    return torch.compile(block, backend="aot_eager")


def compiled_in_place(block):
    block.compile(backend="aot_eager")
    return block


def wrap_blocks(model, *wraps):
    for n, block in enumerate(model.layers):
        for wrap in wraps:
            block = wrap(block)
        model.layers[n] = block
    return model


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("compile_block", [compiled, compiled_in_place])
def test_a_block_compiled_inside_of_a_checkpoint_is_refused_in_the_first_forward(
    compile_block, is_before
):
    model = Net().double()
    if is_before:
        model = adapted(wrap_blocks(model, compile_block, checkpoint_wrapper), res_mode="ms")
    else:
        model = wrap_blocks(adapted(model, res_mode="ms"), compile_block, checkpoint_wrapper)
    with torch.no_grad():
        model(x_of())  # nothing is recomputed
    with pytest.raises(RuntimeError, match=r"inside of a checkpoint.*got that of layers\.1\.lin"):
        model(x_of())


@pytest.mark.parametrize(
    ("res_mode", "wraps"),
    [("is", [checkpoint_wrapper, compiled]), ("ms", [checkpoint_wrapper, compiled_in_place]),
     ("bs", [compiled, checkpoint_wrapper]), ("none", [compiled_in_place, checkpoint_wrapper])],
)  # fmt: skip
def test_compiled_checkpoints_and_what_hands_on_nothing_have_their_gradients(res_mode, wraps):
    model = adapted(res_mode=res_mode)
    wanted = gradients(model, x_of(), x_of(1))
    assert_equal(gradients(wrap_blocks(model, *wraps), x_of(), x_of(1)), wanted)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_norms_are_recorded_in_a_compiled_checkpoint(res_mode, backend):
    model = adapted(res_mode=res_mode, norm_window=5).train()
    model.checkpointing = {"use_reentrant": False}
    twin = copy.deepcopy(model)
    wanted = gradients(model, x_of(), x_of(1))
    assert_equal(gradients(torch.compile(twin, backend=backend), x_of(), x_of(1)), wanted)
    for layer, other in zip(find_layers(model), find_layers(twin), strict=True):
        # The backend "eager" records those of a recompute again, so that all stand there twice.
        assert int(layer.norm_count) == 2 and int(other.norm_count) == (4, 2)[backend != "eager"]
        means = [x.norms[:, : int(x.norm_count)].mean(1) for x in (layer, other)]
        torch.testing.assert_close(*means)


def test_a_layer_of_transformers_compiled_inside_of_its_own_checkpoint_is_refused():
    pytest.importorskip("transformers", minversion="5")
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="is").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = [g.double() for g in token_gradients(model)]
    layers = model.model.layers
    layers[0], layers[1] = compiled(layers[0]), compiled(layers[1])  # these checkpoint themselves
    assert_equal([g.double() for g in token_gradients(model)], wanted)
    model = adapted(tiny_llama(), target_modules=["q_proj"], res_mode="is").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled_in_place(model.model.layers[1])
    with pytest.raises(RuntimeError, match=r"got that of model\.layers\.1\.self_attn\.q_proj"):
        model(input_ids=tokens())


def token_gradients(model):
    ids = torch.arange(3, 17).view(2, 7)
    return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained(model))
