"""Passes: taps of one forward, checkpointing, copies, threads, generation, broken links."""

import copy
import io
import pickle
import threading

import pytest
import torch
from models import (
    DOUBLE,
    LINKED,
    NON_REENTRANT,
    Net,
    adapted,
    assert_equal,
    gradients,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    tokens,
    trained,
    x_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from reslora import _C, print_links
from reslora.injection.adapted import find_layers, injection_of
from reslora.injection.links import mixed_links
from reslora.nn import recompute, session


def the_session(model):
    return injection_of(model, "test").sessions[0]


# ---- One forward


def test_a_pass_begins_empty_and_ends_with_the_forward():
    model = adapted()
    opened = the_session(model).open
    seen = []
    handle = model.layers[3].register_forward_pre_hook(
        lambda *_: seen.append(sorted(opened.passes[-1].taps))
    )
    model(x_of())
    model(x_of(1))
    key = "layers.*.lin"
    assert seen == [[(key, 0, 0), (key, 1, 0), (key, 2, 0)]] * 2 and opened.passes == []
    handle.remove()


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_a_clean_forward_after_an_exception(res_mode, pre_num):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    want = model(x_of(1))

    def fail(*_):
        raise RuntimeError("planted")

    handle = model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        model(x_of())
    assert the_session(model).open.passes == []
    handle.remove()
    assert torch.equal(model(x_of(1)), want)


def test_a_hook_that_fails_before_the_forward_leaves_no_pass():
    model = adapted()

    def fail(*_):
        raise RuntimeError("planted")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        model(x_of())
    assert the_session(model).open.passes == []
    handle.remove()


def test_a_pass_left_by_an_interrupt_is_dropped():
    model = adapted()
    want = model(x_of())

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x_of())
    handle.remove()
    assert torch.equal(model(x_of()), want) and the_session(model).open.passes == []


def test_evaluation_between_training_steps_changes_nothing():
    model, parameters = adapted(), None
    parameters = trained(model)
    loss = model(x_of()).square().sum()
    want = gradients(model, x_of())
    with torch.no_grad():
        model.eval()(x_of(1, rows=5))
    model.train()
    assert_equal(torch.autograd.grad(loss, parameters), want)


# ---- Checkpointing: gradients equal those without


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 2), ("none", 1)])
def test_checkpointing_gives_the_same_gradients(res_mode, pre_num, early_stop, offload):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    with set_checkpoint_early_stop(early_stop):
        if offload:
            with torch.autograd.graph.save_on_cpu():
                got = gradients(model, x_of())
        else:
            got = gradients(model, x_of())
    assert_equal(got, want)


def test_checkpointing_with_dropout_uses_the_same_masks():
    model = adapted(res_mode="is", lora_dropout=0.4)
    torch.manual_seed(5)
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    torch.manual_seed(5)
    assert_equal(gradients(model, x_of()), want)


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_two_forwards_before_one_backward(res_mode, pre_num):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    inputs = x_of(), x_of(1), x_of()  # the same input twice
    want = gradients(model, *inputs)
    for mode in (None, NON_REENTRANT):
        model.checkpointing = mode
        assert_equal(gradients(model, *inputs), want)


def test_separate_backwards_in_any_order():
    model = adapted(res_mode="ms", pre_num=-1)
    inputs = [x_of(seed) for seed in range(3)]
    want = [gradients(model, x) for x in inputs]
    model.checkpointing = NON_REENTRANT
    losses = [model(x).square().sum() for x in inputs]
    for n in (1, 0, 2):
        assert_equal(torch.autograd.grad(losses[n], trained(model)), want[n])


def test_a_forward_between_forward_and_backward():
    model = adapted()
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    loss = model(x_of()).square().sum()
    with torch.no_grad():
        model(x_of(1, rows=9))
    model(x_of(2))
    assert_equal(torch.autograd.grad(loss, trained(model)), want)


def test_a_backward_in_another_thread():
    model = adapted(res_mode="ms", pre_num=2)
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    loss, got = model(x_of()).square().sum(), []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(loss, trained(model))))
    thread.start()
    with torch.no_grad():
        model(x_of(1))  # a pass of this thread is no pass of the other
    thread.join()
    assert_equal(got, want)


def test_a_second_backward_over_a_kept_graph():
    model = adapted()
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    loss = model(x_of()).square().sum()
    for keep in (True, False):
        assert_equal(torch.autograd.grad(loss, trained(model), retain_graph=keep), want)


def test_nested_checkpoints_and_a_checkpointed_root():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net().double()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    model = adapted(Outer(), res_mode="ms", pre_num=2)
    want = gradients(model.net, x_of())
    for mode in (None, NON_REENTRANT):
        model.net.checkpointing = mode
        assert_equal(gradients(model, x_of()), want)


def test_a_checkpoint_over_several_blocks():
    class Two(Net):
        def forward(self, x):
            for i in (0, 2):
                x = checkpoint(lambda x, i=i: self.layers[i + 1](self.layers[i](x)), x,
                               use_reentrant=False)  # fmt: skip
            return x

    model = adapted(Two().double())
    other = adapted()
    other.load_state_dict(model.state_dict())
    assert_equal(gradients(model, x_of()), gradients(other, x_of()))


def test_a_recompute_records_no_statistic():
    model = adapted()
    model.checkpointing = NON_REENTRANT
    for step in (1, 2):
        gradients(model, x_of(step))
        layer = model.layers[2].lin
        assert layer.norm_count.item() == step
        assert layer.link_use == {(True, ""): step}


def test_records_die_with_their_graph():
    model = adapted()
    model.checkpointing = NON_REENTRANT
    loss = model(x_of()).square().sum()
    records = the_session(model).records
    assert [ref() is not None for ref in records] == [True]
    loss.backward()
    del loss
    assert [ref() is not None for ref in records] == [False]
    with torch.no_grad():
        model(x_of())
    assert len(the_session(model).records) == 1  # without gradients none is made


def test_a_recompute_without_a_record_is_an_error():
    model = adapted()
    with pytest.warns(UserWarning, match="was not called"):
        y = checkpoint(model.layers[1], x_of(), use_reentrant=False)
    with pytest.raises(
        RuntimeError, match=r"layers\.1\.lin is recomputed, but its forward left no"
    ):
        y.sum().backward()


@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_reentrant_checkpointing_is_refused(res_mode):
    model = adapted(res_mode=res_mode)
    model.checkpointing = {"use_reentrant": True}
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        model(x_of().requires_grad_())
    model.checkpointing = None
    model(x_of()).sum().backward()


def test_without_torchs_private_names_checkpointing_is_refused(monkeypatch):
    model = adapted()
    want = gradients(model, x_of())
    monkeypatch.setattr(recompute, "CAN_RECOMPUTE", False)
    assert_equal(gradients(model, x_of()), want)
    model.checkpointing = NON_REENTRANT
    y = model(x_of())
    with pytest.raises(RuntimeError, match="train without checkpointing"):
        y.sum().backward()


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_checkpointing_of_transformers(res_mode, pre_num):
    options = {"target_modules": "all-linear", "res_mode": res_mode, "pre_num": pre_num}
    llama = adapted(tiny_llama(), **options).double().train()
    vit = adapted(tiny_vit(), exclude_modules=["classifier"], **options).double().train()
    batches = [{"input_ids": tokens()}, {"pixel_values": torch.randn(2, 3, 8, 8, **DOUBLE)}]
    for model, batch in zip((llama, vit), batches, strict=True):
        want = torch.autograd.grad(model(**batch).logits.square().sum(), trained(model))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        got = torch.autograd.grad(model(**batch).logits.square().sum(), trained(model))
        assert_equal(got, want)


# ---- Copies


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", -1)])
def test_copies_after_a_forward_work(res_mode, pre_num):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    loss = model(x_of()).square().sum()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    want = model(x_of(1)), gradients(model, x_of(1))
    for other in copies:
        assert torch.equal(other(x_of(1)), want[0])
        other.checkpointing = NON_REENTRANT
        assert_equal(gradients(other, x_of(1)), want[1])
        assert find_layers(other)[0].chain.layers == find_layers(other)
        if res_mode != "bs":
            assert find_layers(other)[1].norm_count.item() == 3
            assert the_session(other) is not the_session(model)
    loss.backward()


# ---- Links broken in a forward


class Skipping(Net):
    skipped: tuple = ()

    def forward(self, x):
        for n, layer in enumerate(self.layers):
            x = x if n in self.skipped else layer(x)
        return x


def block_of(layer):
    base = layer.base_layer
    return _C.formulas.Block(base.weight, base.bias, layer.reslora_A, layer.reslora_B, 1.5)


def test_a_skipped_layer_leaves_its_reader_plain():
    model = adapted(Skipping().double(), res_mode="is")
    model.skipped = (1,)
    for n, block in enumerate(model.layers):
        block.lin.is_disabled = n in (0, 3)
    x = x_of()
    layer = model.layers[2].lin
    first = model.layers[0](x)
    block = block_of(layer)
    want = model.layers[3](torch.tanh(_C.formulas.forward_is(block, first, None)))
    torch.testing.assert_close(model(x), want)
    reason = "layers.1.lin did not run before it"
    assert layer.link_use == {(True, reason): 1}
    model.skipped = ()
    model.layers[1].lin.is_disabled = False
    model(x)
    assert layer.link_use == {(True, reason): 1, (True, ""): 1}
    assert mixed_links(model) == ["layers.2.lin"]
    text = print_links(model)
    assert f"layers.2.lin: not linked in 1 of 2 reads in training: {reason}" in text


def test_a_reader_of_several_taps_uses_those_that_are_there():
    model = adapted(Skipping().double(), res_mode="ms", pre_num=2)
    model.skipped = (1,)
    layers = [block.lin for block in model.layers]
    layers[3].is_disabled = True
    blocks = [block_of(layer) for layer in layers]
    x0 = x_of()
    x2 = torch.tanh(_C.formulas.forward_ms([blocks[0]], 0, 0, [x0]))
    x3 = torch.tanh(_C.formulas.forward_ms([blocks[0], blocks[2]], 1, 1, [x0, x2]))
    torch.testing.assert_close(model(x0), model.layers[3](x3))


def test_a_recompute_leaves_out_the_same_taps():
    class Reordered(Net):
        def forward(self, x):
            for n in (1, 0, 2, 3):  # layer 1 runs before the layer whose tap it reads
                layer = self.layers[n]
                x = (
                    layer(x)
                    if self.checkpointing is None
                    else checkpoint(layer, x, **NON_REENTRANT)
                )
            return x

    model = adapted(Reordered().double(), res_mode="ms", pre_num=2)
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    assert_equal(gradients(model, x_of()), want)


def test_another_number_of_tokens_breaks_a_link():
    class Pooling(Net):
        def forward(self, x):
            return self.layers[1](self.layers[0](x).mean(1, keepdim=True))

    model = adapted(Pooling(depth=2).double())
    model(torch.randn(2, 3, 6, **DOUBLE))
    (use,) = model.layers[1].lin.link_use.items()
    assert use == ((True, "layers.0.lin ran on another number of tokens"), 1)


def test_strict_links_raise_in_the_forward():
    model = adapted(Skipping().double(), strict_links=True)
    model(x_of())
    model.skipped = (1,)
    with pytest.raises(RuntimeError, match=r"strict_links demands every link; got layers\.2\.lin"):
        model(x_of())


def test_layers_called_without_their_root_run_plain_and_warn_once(recwarn):
    model = adapted()
    model.layers[1](x_of())
    model.layers[2](x_of())
    messages = [str(w.message) for w in recwarn.list]
    assert len(messages) == 1 and "layers.1.lin ran without its shortcut" in messages[0]
    assert model.layers[2].lin.link_use == {(True, session.NOT_CALLED): 1}


# ---- Generation


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 1)])
def test_decoding_with_a_cache_equals_the_full_forward(res_mode, pre_num):
    model = adapted(tiny_llama(), 0.3, target_modules="all-linear", res_mode=res_mode,
                    pre_num=pre_num).double().eval()  # fmt: skip
    ids = tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    full = model(out.sequences).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits.double(), full[:, 4 + step], rtol=1e-5, atol=1e-6)
    without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(out.sequences, without)
    for layer in find_layers(model)[1:]:
        assert set(layer.link_use) <= {(False, "")}


def test_static_caches_and_reordered_beams():
    model = adapted(tiny_llama(2), 0.3, target_modules=["k_proj", "v_proj"]).double().eval()
    ids = tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 3):
        without = model.generate(ids, use_cache=False, num_beams=beams, **options)
        assert torch.equal(model.generate(ids, num_beams=beams, **options), without)
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, **options))


def test_t5_generates_with_its_encoder_called_outside(recwarn):
    model = adapted(tiny_t5(), 0.3, target_modules=["q", "k", "v", "o"]).double().eval()
    ids = tokens(2, 6)
    out = model.generate(ids, max_new_tokens=5, do_sample=False, output_logits=True,
                         return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
    full = model(input_ids=ids, decoder_input_ids=out.sequences).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits.double(), full[:, step], rtol=1e-5, atol=1e-6)
    alone = model.get_encoder()(ids).last_hidden_state
    torch.testing.assert_close(alone, model(input_ids=ids, decoder_input_ids=ids)[2])
    assert not [w for w in recwarn.list if "shortcut" in str(w.message)]
    for layer in find_layers(model):
        assert set(layer.link_use) <= {(False, "")}, layer.name


def test_padded_rows_do_not_disturb_the_others():
    model = adapted(tiny_llama(), 0.3, target_modules=["q_proj", "v_proj"]).double().eval()
    ids = tokens(1, 5)
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=ids.dtype)], 1)
    mask = (torch.arange(8) < 5).long()[None]
    got = model(padded, attention_mask=mask).logits[:, :5]
    torch.testing.assert_close(got, model(ids).logits)
