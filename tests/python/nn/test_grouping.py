"""Layers that read the same x: one op for q, k and v, with the values that they have apart."""

import copy
import pickle

import pytest
import torch
from models import (
    NON_REENTRANT,
    SHORTCUTS,
    adapted,
    gradients,
    tiny_llama,
    tokens,
    trained,
)
from samples import make_sample
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from reslora import finish, merge, print_links, unmerge
from reslora.injection.adapted import find_layers, injection_of
from reslora.nn import ops
from reslora.nn.layer import ALONE

F64 = {"dtype": torch.float64}


class Attention(nn.Module):
    """Projections of one x, or of two where `context` is given, and a layer that reads another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=k % 2 == 0) for k in range(4)
        )
        self.between = None

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self.q_proj(x)
        if self.between is not None:
            self.between(x)
        k, v = self.k_proj(context), self.v_proj(context)
        return x + self.o_proj(torch.tanh(q * k + v))


class Ordered(Attention):
    """The same, with the projections called in another order."""

    order = ("k_proj", "v_proj", "q_proj")

    def forward(self, x, context=None):
        found = {name: getattr(self, name)(x) for name in self.order}
        mixed = sum(torch.tanh((k + 1) * y) for k, y in enumerate(found.values()))
        return x + self.o_proj(mixed)


class Stack(nn.Module):
    def __init__(self, width: int = 6, depth: int = 3, block=Attention) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.is_checkpointed = False

    def forward(self, x, context=None):
        for block in self.blocks:
            if self.is_checkpointed:
                x = checkpoint(block, x, context, **NON_REENTRANT)
            else:
                x = block(x, context)
        return x


def stack(block=Attention, **options):
    torch.manual_seed(0)
    return adapted(Stack(block=block).double(), target_modules="all-linear", **options)


def apart(model):
    """Return a copy whose layers are evaluated one by one."""
    model = copy.deepcopy(model)
    for layer in find_layers(model):
        layer.group = ALONE
    return model


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the op evaluated."""
    counts, real = [], ops.adapt

    def count(x, members, **options):
        counts.append(len(members))
        return real(x, members, **options)

    monkeypatch.setattr(ops, "adapt", count)
    return counts


def assert_same(model, reference, *inputs):
    for x in inputs:
        torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)
    for got, want in zip(gradients(model, *inputs), gradients(reference, *inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- the op

MODES = [("none", 0), ("is", 1), ("bs", 2), ("ms", 2)]


def members_of(samples):
    members = []
    for sample in samples:
        w = sample.wiring
        base = (None, None, sample.base_out)
        if sample.base_out is None:
            base = (sample.weight, sample.bias, None)
        members.append(ops.member(*base, sample.A, sample.B, w.scaling, sample.taps, w.keep_tap))
    return members


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("leading", [(3,), (2, 3), (1,), (0,)])
def test_layers_together_equal_layers_apart(leading, dropout):
    """One layer of each shortcut, one of them a black box, with one mask and one x."""
    options = {"leading": leading, "dropout": dropout}
    samples = [make_sample(mode, m, 2, bias=m != 1, **options) for mode, m in MODES]
    x, bits = samples[0].x, samples[0].bits
    samples[3].base_out = torch.randn(*leading, 6, **F64).requires_grad_()
    out = ops.adapt(x, members_of(samples), dropout=dropout, bits=bits, want_norms=True)
    single = [
        ops.adapt(x, [member], dropout=dropout, bits=bits, want_norms=True)
        for member in members_of(samples)
    ]
    torch.testing.assert_close(out[:-2], [t for one in single for t in one[:3]])
    torch.testing.assert_close(out[-1], torch.cat([one[4] for one in single]))
    wanted = [x, samples[3].base_out]
    wanted += [t for sample in samples for t in sample.differentiable()[1:]]
    have, want = (
        torch.autograd.grad(sum(t.square().sum() for t in ts if t.requires_grad), wanted)
        for ts in (out, [t for one in single for t in one])
    )
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_together_in_other_types(dtype):
    samples = [make_sample(mode, m, 2, leading=(5,), dtype=dtype) for mode, m in MODES]
    out = ops.adapt(samples[0].x, members_of(samples))
    loss = sum(t.float().square().sum() for t in out if t.requires_grad)
    grads = torch.autograd.grad(loss, samples[0].differentiable()[1:])
    single = [ops.adapt(samples[0].x, [member]) for member in members_of(samples)]
    torch.testing.assert_close(out[:-2], [t for one in single for t in one[:3]])
    loss = sum(t.float().square().sum() for one in single for t in one if t.requires_grad)
    want = torch.autograd.grad(loss, samples[0].differentiable()[1:])
    torch.testing.assert_close(grads, want)


def test_gradients_of_layers_together():
    samples = [make_sample(mode, m, 2, dropout=0.25) for mode, m in MODES]
    counts = [len(sample.differentiable()) - 1 for sample in samples]

    def run(x, *rest):
        rest = list(rest)
        for sample, count in zip(samples, counts, strict=True):
            own, rest = rest[:count], rest[count:]
            t, a = len(sample.taps), len(sample.A)
            sample.taps, sample.A, sample.B = own[:t], own[t : t + a], own[t + a :]
        out = ops.adapt(x, members_of(samples), dropout=0.25, bits=samples[0].bits)
        return tuple(t for t in out if t.requires_grad)

    inputs = [t for sample in samples for t in sample.differentiable()[1:]]
    assert torch.autograd.gradcheck(run, (samples[0].x, *inputs))


def test_outputs_of_layers_together_share_no_memory():
    for leading in ((3,), (1,)):
        samples = [make_sample(mode, m, 0, leading=leading) for mode, m in MODES]
        out = [t for t in ops.adapt(samples[0].x, members_of(samples)) if t.numel()]
        assert len({t.untyped_storage().data_ptr() for t in out}) == len(out)
        assert all(t.untyped_storage().nbytes() == t.numel() * 8 for t in out)


def test_an_unused_layer_gets_zero_gradients():
    samples = [make_sample("none", 0, 0) for _ in range(2)]
    out = ops.adapt(samples[0].x, members_of(samples))
    grads = torch.autograd.grad(out[0].sum(), [*samples[1].A, *samples[1].B])
    assert not any(grad.any() for grad in grads)
    (dx,) = torch.autograd.grad(ops.adapt(samples[0].x, members_of(samples))[0].sum(), samples[0].x)
    member = members_of(samples)[0]
    (want,) = torch.autograd.grad(ops.adapt(samples[0].x, [member])[0].sum(), samples[0].x)
    torch.testing.assert_close(dx, want)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_a_model_equals_its_layers_apart(res_mode, pre_num, calls):
    model = stack(res_mode=res_mode, pre_num=pre_num)
    reference = apart(model)
    x = torch.randn(2, 5, 6, **F64)
    model(x)
    assert calls == [3, 1] * 3
    reference(x)
    assert_same(model, reference, x, torch.randn(4, 6, **F64))
    model.eval(), reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)
    for layer, other in zip(find_layers(model), find_layers(reference), strict=True):
        if layer.norms is not None:
            torch.testing.assert_close(layer.norms, other.norms)
            assert torch.equal(layer.norm_count, other.norm_count)
        assert layer.link_use == other.link_use


def test_a_llama_needs_four_calls_a_block(calls):
    model = tiny_llama(2)
    adapted(model, target_modules="all-linear", res_mode="is")
    ids = tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    assert calls == [3, 1, 2, 1] * 2
    assert print_links(model).count("evaluated together") == 4
    assert all(p.grad is not None for p in trained(model))


def test_other_names_and_lone_layers_are_left_alone(calls):
    model = stack(exclude_modules=["k_proj", "v_proj"], res_mode="is")
    model(torch.randn(3, 6, **F64))
    assert calls == [1] * 6


@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 1), ("is", 1), ("ms", -1), ("bs", 2)])
def test_a_recompute_draws_the_same_mask(res_mode, pre_num):
    model = stack(res_mode=res_mode, pre_num=pre_num, lora_dropout=0.5)
    reference = copy.deepcopy(model)
    model.is_checkpointed = True
    x, grads = torch.randn(4, 6, **F64), []
    for one in (model, reference):
        torch.manual_seed(1)
        loss = one(x).square().sum() + one(2 * x).square().sum()
        grads.append(torch.autograd.grad(loss, trained(one)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("order", ["sum", "oldest first", "newest first"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_that_reads_another_x_leaves_its_group(is_checkpointed, order, dropout, calls):
    """Cross-attention: k and v read the context; also in the forward in which that is found out."""
    model = stack(res_mode="is", lora_dropout=dropout)
    reference = copy.deepcopy(model)
    model.is_checkpointed = is_checkpointed
    x, context = torch.randn(4, 6, **F64), torch.randn(4, 6, **F64)
    grads = []
    for one in (model, reference):
        torch.manual_seed(1)
        if one is reference and dropout == 0:  # else the masks differ, since k and v share one
            one = apart(one)
        losses = [one(k * x, context).square().sum() for k in (1, 2)]
        if order == "sum":
            losses = [sum(losses)]
        for loss in losses if order != "newest first" else losses[::-1]:
            loss.backward()
        grads.append([p.grad for p in trained(one)])
    torch.testing.assert_close(*grads)
    names = [name.split(".")[-1] for name in model.blocks[0].q_proj.group.names]
    assert names == ["k_proj", "v_proj"]  # which read the context, both
    calls.clear()
    model.is_checkpointed = False
    model(x, context)
    assert calls == [1, 2, 1] * 3


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("order", [("k_proj", "v_proj", "q_proj"), ("v_proj", "q_proj", "k_proj")])
def test_whichever_layer_is_called_first_computes(order, is_checkpointed, calls, monkeypatch):
    monkeypatch.setattr(Ordered, "order", order)
    model = stack(Ordered, res_mode="ms", pre_num=-1, lora_dropout=0.5)
    reference = copy.deepcopy(model)
    model.is_checkpointed = is_checkpointed
    x, grads = torch.randn(4, 6, **F64), []
    for one in (model, reference):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(one(x).square().sum(), trained(one)))
    torch.testing.assert_close(*grads)
    assert calls[:6] == [3, 1] * 3


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_layer_that_is_not_called_is_not_computed_for_ever(is_checkpointed, calls, monkeypatch):
    monkeypatch.setattr(Ordered, "order", ("q_proj", "v_proj"))
    model = stack(Ordered, res_mode="is")
    model.is_checkpointed = is_checkpointed
    reference = apart(model)
    x = torch.randn(4, 6, **F64)
    torch.testing.assert_close(model(x), reference(x))
    model(x).sum().backward()
    calls.clear()
    model.is_checkpointed = False
    model(x)
    assert calls == [2, 1] * 3


def test_taps_that_come_between_are_added(monkeypatch):
    """All q first, then all k: what k reads is not there yet when q is called."""

    class Crossed(Stack):
        def forward(self, x, context=None):
            ys = [block.q_proj(x) for block in self.blocks]
            ys += [block.k_proj(x) for block in self.blocks]
            return sum(torch.tanh((n + 1) * y) for n, y in enumerate(ys))

    torch.manual_seed(0)
    model = adapted(Crossed().double(), target_modules=["q_proj", "k_proj"], res_mode="is")
    assert_same(model, apart(model), torch.randn(3, 6, **F64))


def test_a_base_without_a_weight_is_evaluated_alone():
    class Foreign(nn.Module):
        in_features = out_features = 6

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.randn(6, 6, **F64))

        def forward(self, x):
            return x @ self.qweight

    torch.manual_seed(0)
    model = Stack().double()
    for block in model.blocks:
        block.q_proj, block.k_proj, block.v_proj = Foreign(), Foreign(), Foreign()
    model = adapted(model, target_modules=["q_proj", "k_proj", "v_proj"], res_mode="is").double()
    assert_same(model, apart(model), torch.randn(3, 6, **F64))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_x_that_was_changed_in_between_is_computed_anew(context):
    model = stack(res_mode="is").eval()
    reference = apart(model)
    for one in (model, reference):
        for block in one.blocks:
            block.between = lambda x: x.mul_(2)
    x = torch.randn(3, 6, **F64)
    with context():
        torch.testing.assert_close(model(x.clone()), reference(x.clone()))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_part_without_autocast_keeps_its_precision_when_compiled():
    model = adapted(Stack(), target_modules="all-linear", res_mode="none")
    block = model.blocks[0]

    def parts(x):
        with torch.autocast("cpu", torch.bfloat16):
            q = block.q_proj(x)
            with torch.autocast("cpu", enabled=False):
                return q, block.k_proj(x)

    def mixed(x):
        return model(x), *parts(x)

    _, q, k = torch.compile(mixed, backend="aot_eager")(torch.randn(3, 6))
    assert (q.dtype, k.dtype) == (torch.bfloat16, torch.float32)


def test_a_part_without_autocast_keeps_its_precision():
    torch.manual_seed(0)
    model = adapted(Stack(), target_modules="all-linear", res_mode="is")
    layers, x = model.blocks[0], torch.randn(3, 6)
    seen = []

    def run(module, args, output):
        with torch.autocast("cpu", torch.bfloat16):
            q = layers.q_proj(x)
            with torch.autocast("cpu", enabled=False):
                seen.extend([q.dtype, layers.k_proj(x).dtype])

    model.blocks[2].register_forward_hook(run)
    model(x)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_with_frozen_adapters_sees_changes_of_x():
    model = stack(res_mode="is").requires_grad_(False)
    reference = apart(model)
    for one in (model, reference):
        for block in one.blocks:
            block.between = lambda x: x.mul_(2)
    call = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 6, **F64)
    torch.testing.assert_close(call(x.clone()), reference(x.clone()))


def test_nothing_waits_after_a_backward():
    model = stack(res_mode="is", lora_dropout=0.5)
    model.is_checkpointed = True
    for block in model.blocks:  # something that saves between q and k: a recompute may stop there
        block.q_proj.register_forward_hook(lambda m, a, y: torch.tanh(y))
    model(torch.randn(3, 6, **F64)).square().sum().backward()
    sessions = injection_of(model, "test").sessions
    assert sessions and not any(session.open.ahead for session in sessions)


def test_an_exception_in_between_leaves_nothing():
    model = stack(res_mode="ms", pre_num=-1)
    reference = apart(model)

    def fail(x):
        raise KeyboardInterrupt

    model.blocks[1].between = fail
    x = torch.randn(3, 6, **F64)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.blocks[1].between = None
    assert_same(model, reference, x)
    sessions = injection_of(model, "test").sessions
    assert sessions and not any(session.open.ahead for session in sessions)


@pytest.mark.parametrize("what", ["hook", "disabled", "observer", "call", "pre-hook", "dropout"])
def test_what_is_particular_about_a_layer_counts(what):
    model = stack(res_mode="is")
    seen = []
    layer = model.blocks[1].k_proj
    if what == "hook":
        layer.base_layer.register_forward_hook(lambda m, a, y: y + 1)
    elif what == "disabled":
        layer.is_disabled = True
    elif what == "dropout":
        layer.lora_dropout = 0.5  # of this layer alone, and off in eval mode
        model.eval()
    elif what == "pre-hook":
        layer.register_forward_pre_hook(lambda m, a: seen.append(1))
    elif what == "observer":
        layer.observer = lambda x, s, y: seen.append((x, s, y))
    else:
        layer.register_forward_hook(lambda m, a, y: seen.append(y) or 2 * y)
    reference = apart(model)
    for name in ("observer", "is_disabled"):  # a copy begins without
        setattr(reference.blocks[1].k_proj, name, getattr(layer, name))
    x = torch.randn(3, 6, **F64)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)
    assert len(seen) == (0 if what in ("hook", "disabled", "dropout") else 2)
    if what != "disabled":  # whose A and B have no gradients
        assert_same(model, reference, x)


def test_a_layer_alone_outside_of_a_pass_works():
    model = stack(res_mode="none")
    x = torch.randn(3, 6, **F64)
    torch.testing.assert_close(
        model.blocks[0].q_proj(x), apart(model).blocks[0].q_proj(x), rtol=1e-12, atol=1e-12
    )


def test_copies_merging_and_finishing_keep_the_values():
    model = stack(res_mode="is")
    x = torch.randn(8, 6, **F64)
    wanted = model(x)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one(x), wanted)
        assert one.blocks[0].q_proj.group is one.blocks[0].v_proj.group
        assert one.blocks[0].q_proj.group.layers[0] is one.blocks[0].q_proj
    merge(model)
    assert not torch.allclose(model(x), wanted)  # the rule `input` is approximate
    unmerge(model)
    torch.testing.assert_close(model(x), wanted)
    finish(model, [torch.randn(30, 6, **F64) for _ in range(3)])
    assert_same(model, apart(model), x)
    assert model.blocks[0].q_proj.group.names


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 1), ("is", 1), ("bs", 2), ("ms", -1)])
def test_a_compiled_model_is_one_graph(res_mode, pre_num):
    model = stack(res_mode=res_mode, pre_num=pre_num)
    reference = apart(model)
    counters.clear()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 6, **F64)
        torch.testing.assert_close(call(x), reference(x))
        got, want = (
            torch.autograd.grad(f(x).square().sum(), trained(m))
            for f, m in ((call, model), (reference, reference))
        )
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(call(x), reference(x))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_cross_attention_is_right():
    model = stack(res_mode="is")
    reference = apart(model)
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, context = torch.randn(4, 6, **F64), torch.randn(4, 6, **F64)
        torch.testing.assert_close(call(x, context), reference(x, context))
