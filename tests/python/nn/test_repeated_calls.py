"""Layers that are called several times in a forward, and forwards in one another."""

import copy
import gc
import weakref

import pytest
import torch
from models import (
    DOUBLE,
    LINKED,
    NON_REENTRANT,
    SPECIAL,
    Net,
    adapted,
    assert_equal,
    gradients,
    literal,
    tiny_bert,
    tokens,
    trained,
    x_of,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from reslora import print_links
from reslora.injection.adapted import find_layers, injection_of


def like(net: nn.Module, model: nn.Module, **options) -> nn.Module:
    """Return `net` adapted with the weights and adapters of `model`."""
    other = adapted(net.double(), **options)
    other.load_state_dict(model.state_dict())
    return other


def loss_of(model, batch):
    return model(**batch)[0].square().sum()


def assert_checkpointing_changes_nothing(model, batch):
    model.train()
    want = torch.autograd.grad(loss_of(model, batch), trained(model), allow_unused=True)
    model.gradient_checkpointing_enable(NON_REENTRANT)
    got = torch.autograd.grad(loss_of(model, batch), trained(model), allow_unused=True)
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if w is not None]
    assert pairs
    assert_equal(*zip(*pairs, strict=True))


# ---- Layer by layer, each of them on parts of the tokens


class Chunked(Net):
    """Each layer runs on two halves of the rows; `scope` is what one checkpoint holds."""

    scope = "layer"

    def in_halves(self, layer, x):
        return torch.cat([self.run(layer, part, "chunk") for part in x.chunk(2)])

    def run(self, function, x, scope):
        if self.checkpointing is None or self.scope != scope:
            return function(x)
        return checkpoint(function, x, **self.checkpointing)

    def forward(self, x):
        for layer in self.layers:
            x = self.run(lambda x, layer=layer: self.in_halves(layer, x), x, "layer")
        return x


@pytest.mark.parametrize("scope", ["layer", "chunk"])
@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 2), ("none", 1)])
def test_the_kth_call_of_a_layer_reads_the_kth_call_before_it(res_mode, pre_num, scope):
    options = {"res_mode": res_mode, "pre_num": pre_num}
    whole = adapted(**options)
    model = like(Chunked(), whole, **options)
    x = x_of(rows=4)
    torch.testing.assert_close(model(x), whole(x), rtol=1e-11, atol=1e-12)
    want = gradients(whole, x)
    assert_equal(gradients(model, x), want)
    model.checkpointing, model.scope = NON_REENTRANT, scope
    assert_equal(gradients(model, x), want)
    for layer in find_layers(model):
        assert set(layer.link_use) <= {(True, "")}


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_of_berts_feed_forward_equal_the_whole(res_mode, pre_num, checkpointing):
    """chunk_size_feed_forward, which transformers documents as giving the same result."""
    model = tiny_bert().double()
    options = {"target_modules": ["intermediate.dense", "output.dense"]}
    model = adapted(model, 0.3, res_mode=res_mode, pre_num=pre_num, **options)
    batch = {"input_ids": tokens(2, 8)}
    want = model(**batch).logits
    gradient = torch.autograd.grad(loss_of(model, batch), trained(model))
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    torch.testing.assert_close(model(**batch).logits, want, rtol=1e-10, atol=1e-11)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(NON_REENTRANT)
    assert_equal(torch.autograd.grad(loss_of(model, batch), trained(model)), gradient)


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_a_chunk_of_another_text_changes_nothing(res_mode, pre_num):
    """What a row becomes depends on its own rows in earlier layers alone."""
    model = adapted(Chunked().double(), res_mode=res_mode, pre_num=pre_num)
    x, y = x_of(rows=4), x_of(1, rows=4)
    mixed = torch.cat([x[:2], y[2:]])
    torch.testing.assert_close(model(mixed)[:2], model(x)[:2], rtol=1e-11, atol=1e-12)


class Time(nn.Module):
    """Two recurrent layers; `layer_outer`: the first runs over all steps, then the second."""

    def __init__(self, layer_outer: bool, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(6, 6)}) for _ in range(depth))
        self.layer_outer = layer_outer

    def forward(self, x):
        state = [torch.zeros_like(x[0]) for _ in self.layers]
        if self.layer_outer:
            for n, layer in enumerate(self.layers):
                outputs = []
                for step in x:
                    state[n] = torch.tanh(layer["lin"](step + state[n]))
                    outputs.append(state[n])
                x = torch.stack(outputs)
            return x
        outputs = []
        for step in x:
            for n, layer in enumerate(self.layers):
                step = state[n] = torch.tanh(layer["lin"](step + state[n]))
            outputs.append(step)
        return torch.stack(outputs)


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_recurrent_layers_pair_by_step_in_either_order(res_mode, pre_num):
    options = {"res_mode": res_mode, "pre_num": pre_num}
    by_step = adapted(Time(False, 3).double(), **options)
    by_layer = like(Time(True, 3), by_step, **options)
    x = torch.randn(5, 2, 6, **DOUBLE)
    torch.testing.assert_close(by_layer(x), by_step(x), rtol=1e-11, atol=1e-12)
    assert_equal(gradients(by_layer, x), gradients(by_step, x))
    for layer in find_layers(by_layer)[1:]:
        assert set(layer.link_use) == {(True, "")}


class Attention(nn.Module):
    """Three projections that are evaluated together, for two halves of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return torch.cat(
            [torch.tanh(self.q(part) * self.k(part) + self.v(part)) for part in x.chunk(2)]
        )


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 2), ("none", 1)])
def test_layers_that_are_evaluated_together_pair_too(res_mode, pre_num):
    class Stack(Net):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(3))

    options = {"target_modules": ["q", "k", "v"], "res_mode": res_mode, "pre_num": pre_num}
    model = adapted(Stack().double(), **options)
    x = x_of(rows=4)
    want = gradients(model, x)
    model.checkpointing = NON_REENTRANT
    assert_equal(gradients(model, x), want)
    halves = [torch.cat([part, part]) for part in x.chunk(2)]  # both calls see the same rows
    expected = torch.cat([model(half)[:2] for half in halves])
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)
    assert len(model.layers[0].q.group.names) == 3


# ---- Two streams in one layer


def tiny_deberta(**options) -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, relative_attention=True,
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **(SPECIAL | options),
    )  # fmt: skip
    return DebertaV2Model(config).eval()


@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_debertas_table_of_positions_is_not_added_to_its_tokens(res_mode):
    """Both have 16 rows here; the literal tap of the tokens is that of the layer before."""
    names = ["query_proj", "key_proj", "value_proj"]
    model = adapted(tiny_deberta().double(), 0.3, target_modules=names, res_mode=res_mode)
    read = []
    key = "encoder.layer.*.attention.self.query_proj"
    layers = [layer for layer in find_layers(model) if layer.chain.key == key]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: read.append((layer.position, args[0])))
    taken = []
    session = injection_of(model, "test").sessions[0]
    real = session.read

    def spy(layer, x, call):
        taps = real(layer, x, call)
        if layer.chain.key == key:
            taken.append((layer.position, x, taps))
        return taps

    session.read = spy
    with torch.no_grad():
        model(input_ids=tokens(1, 16))
    assert len(taken) == 4 and all(len(taps) == 1 for _, _, taps in taken)
    for call, (n, _x, (tap,)) in enumerate(taken):
        inputs = [x for position, x in read if position == n - 1]
        before, own = layers[n - 1], layers[n]
        A = own.reslora_A if res_mode == "is" else before.reslora_A
        want = inputs[call % 2] @ A.T
        if res_mode == "ms":
            earlier = [t for m, _, (t,) in taken if m == n - 1]
            assert before.wiring.handed in ("s", "tap")
            want = want + earlier[call % 2] if before.wiring.handed == "s" and earlier else want
        torch.testing.assert_close(tap, want, rtol=1e-10, atol=1e-11)
    assert inputs[0].shape == inputs[1].shape and not torch.equal(inputs[0], inputs[1])


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("none", 1), ("bs", 1)])
def test_debertas_shared_projections_train_with_checkpointing(res_mode, pre_num):
    names = ["query_proj", "key_proj", "value_proj"]
    options = {"target_modules": names, "res_mode": res_mode, "pre_num": pre_num}
    model = adapted(tiny_deberta().double(), 0.3, **options)
    assert_checkpointing_changes_nothing(model, {"input_ids": tokens(2, 16)})
    for layer in find_layers(model):
        assert set(layer.link_use) <= {(True, "")}


def tiny_pegasus_x() -> nn.Module:
    from transformers import PegasusXConfig, PegasusXModel

    config = PegasusXConfig(
        vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_global_tokens=8,
        block_size=4, stagger_local_blocks=False, dropout=0.0, attention_dropout=0.0,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    return PegasusXModel(config).eval()


@pytest.mark.parametrize("res_mode", ["is", "ms"])
def test_pegasus_x_links_tokens_with_tokens_and_global_ones_with_global_ones(res_mode):
    names = ["q_proj", "k_proj", "v_proj"]
    model = adapted(tiny_pegasus_x().double(), 0.3, target_modules=names, res_mode=res_mode)
    ids = tokens(2, 8)
    batch = {"input_ids": ids, "decoder_input_ids": ids}  # as many tokens as global ones
    assert_checkpointing_changes_nothing(model, batch)
    for layer in find_layers(model):
        assert set(layer.link_use) <= {(True, "")}, layer.name


# ---- Calls that cannot be paired


class Uneven(Net):
    """The first layer runs on two inputs, the second on the second of them alone."""

    def forward(self, x):
        self.layers[0](x.flip(0))
        return self.layers[1](self.layers[0](x))


def test_layers_that_are_called_unequally_often_run_plain_and_say_so():
    model = adapted(Uneven(depth=2).double())
    with pytest.warns(UserWarning, match="unknown which of their calls see the same tokens"):
        model(x_of())
    layer = model.layers[1].lin
    reason = "it ran 1 and layers.0.lin 2 times in one forward"
    plain = like(Uneven(depth=2), model, res_mode="none")
    for block in (model.layers[0].lin, plain.layers[0].lin):
        block.is_disabled = True  # its own input is doubled in `is`
    layer.link_use.clear()
    torch.testing.assert_close(model(x_of()), plain(x_of()))
    assert layer.link_use == {(True, reason): 1}
    assert f"layers.1.lin: not linked in 1 of 1 reads in training: {reason}" in print_links(model)
    other = copy.deepcopy(model)
    other.layers[0].lin.is_disabled = True
    torch.testing.assert_close(other(x_of()), plain(x_of()))


def test_strict_links_refuse_calls_that_cannot_be_paired():
    model = adapted(Uneven(depth=2).double(), strict_links=True)
    with pytest.raises(RuntimeError, match="strict_links demands every link"):
        model(x_of())


def test_a_loop_over_layers_that_is_left_early_keeps_its_links():
    class Early(Net):
        def forward(self, x):
            for n in (0, 1, 2, 0, 1, 2, 0):
                x = self.layers[n](x)
            return x

    model = adapted(Early(depth=3).double())
    for _ in range(2):
        model(x_of())
    for layer in find_layers(model)[1:]:
        assert layer.link_use == {(True, ""): 4}


def test_calls_hidden_in_nested_checkpoints_are_refused():
    class Nested(Net):
        def forward(self, x):
            def inner(x):
                for n in (0, 1, 0, 1):
                    x = checkpoint(self.layers[n], x, **NON_REENTRANT)
                return x

            return checkpoint(inner, x, **NON_REENTRANT)

    y = adapted(Nested(depth=2).double())(x_of())
    with pytest.raises(RuntimeError, match="ran more than once in a forward, inside of nested"):
        y.sum().backward()


# ---- Forwards in one another


@pytest.mark.parametrize("checkpointing", [None, NON_REENTRANT])
@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 1)])
def test_a_model_called_inside_its_own_forward(res_mode, pre_num, checkpointing):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    want, want_inner = model(x_of()), model(x_of(1))
    gradient = gradients(model, x_of())
    model.checkpointing = checkpointing
    inner, is_inside = [], []

    def evaluate(*_):
        if not is_inside and torch._C._current_graph_task_id() == -1:
            is_inside.append(True)
            with torch.no_grad():
                inner.append(model(x_of(1)))
            is_inside.clear()

    for block in model.layers:
        block.register_forward_pre_hook(evaluate)
    torch.testing.assert_close(model(x_of()), want)
    assert_equal(gradients(model, x_of()), gradient)
    assert len(inner) == 8 and all(torch.equal(y, want_inner) for y in inner)
    assert all(session.open.passes == [] for session in injection_of(model, "test").sessions)


@pytest.mark.parametrize("interrupted", ["inner", "outer"])
def test_an_interrupted_forward_inside_another_leaves_the_outer_one_alone(interrupted):
    model = adapted(res_mode="ms", pre_num=-1)
    want = model(x_of())
    depth, calls = [], []

    def evaluate(*_):
        calls.append(len(depth))
        if depth and interrupted == "inner":
            raise KeyboardInterrupt
        if depth or len(calls) > 1:
            return
        depth.append(1)
        try:
            model(x_of(1))
        except KeyboardInterrupt:
            pass
        finally:
            depth.clear()
        if interrupted == "outer":
            raise KeyboardInterrupt

    handle = model.layers[2].register_forward_pre_hook(evaluate)
    if interrupted == "inner":
        torch.testing.assert_close(model(x_of()), want)
    else:
        with pytest.raises(KeyboardInterrupt):
            model(x_of())
    handle.remove()
    torch.testing.assert_close(model(x_of()), want)
    assert injection_of(model, "test").sessions[0].open.passes == []


def test_a_forward_inside_a_group_of_layers_keeps_what_was_computed_ahead():
    """Results that wait for k and v belong to the outer forward, not to the one in q's hook."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return torch.tanh(self.q(x) * self.k(x) + self.v(x))

    model = nn.Sequential(Attention(), Attention()).double()
    model = adapted(model, target_modules=["q", "k", "v"])
    want = model(x_of())
    group = model[0].q.group
    names = group.names
    assert len(names) == 3
    nested = []

    def evaluate(*_):
        if not nested:
            nested.append(True)
            model(x_of(1))

    model[0].q.register_forward_hook(evaluate)
    torch.testing.assert_close(model(x_of()), want)
    assert nested and group.names == names


def test_the_literal_formulas_hold_in_a_nested_forward():
    model = adapted()
    seen = []

    def evaluate(*_):
        if not seen:
            seen.append(None)
            seen[0] = model(x_of(2))

    model.layers[3].register_forward_pre_hook(evaluate)
    torch.testing.assert_close(model(x_of()), literal(model, x_of(), "is", 1))
    torch.testing.assert_close(seen[0], literal(model, x_of(2), "is", 1))


@pytest.mark.parametrize("shape", [(3, 6), (1, 6)])
@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_a_checkpoint_around_a_forward_within_a_forward(res_mode, pre_num, shape):
    """The inner forward begins anew in the recompute; the outer layers find their own calls."""

    class Within(Net):
        depth = 0

        def block(self, layer, x):
            if layer is self.layers[1] and self.depth == 0:
                self.depth = 1
                x = x + 0.1 * self(0.5 * x[: shape[0]]).sum(0, keepdim=True)
                self.depth = 0
            return layer(x)

        def forward(self, x):
            for layer in self.layers:
                if self.checkpointing is None or self.depth:
                    x = self.block(layer, x)
                else:
                    x = checkpoint(self.block, layer, x, **self.checkpointing)
            return x

    model = adapted(Within().double(), res_mode=res_mode, pre_num=pre_num)
    want = gradients(model, x_of())
    model.checkpointing = NON_REENTRANT
    assert_equal(gradients(model, x_of()), want)


@pytest.mark.parametrize(("res_mode", "pre_num"), LINKED)
def test_after_an_interrupt_a_block_alone_reads_no_tap_of_it(res_mode, pre_num):
    model = adapted(res_mode=res_mode, pre_num=pre_num)
    block, kept = model.layers[2], []

    def interrupt(module, args, output):
        kept.append(weakref.ref(output))
        raise KeyboardInterrupt

    handle = model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x_of())
    handle.remove()
    plain = like(Net(), model, res_mode="none")
    with pytest.warns(UserWarning, match="ran without its shortcut"):
        got = block(x_of())
    torch.testing.assert_close(got, plain.layers[2](x_of()))
    gc.collect()
    assert kept[0]() is None  # nor does its graph live on
    assert model(x_of()).isfinite().all()
