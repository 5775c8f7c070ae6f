"""What the rest of torch expects of the op: opcheck, compile, export, autocast, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import SHORTCUTS, adapt, make_chain, make_sample

ADAPT = torch.ops.reslora.adapt.default
BACKWARD = torch.ops.reslora.adapt_backward.default


def arguments(sample, **changes):
    """What the dispatcher's op takes for a sample."""
    w = sample.wiring
    bases, kind = [sample.weight, sample.bias], 1
    if "base_out" in changes:
        bases, kind = [changes.pop("base_out")], 2
    named = {
        "x": sample.x,
        "bases": bases,
        "layout": [kind, len(sample.A), len(sample.B), len(sample.taps), int(w.keep_tap)],
        "A": sample.A,
        "B": sample.B,
        "scaling": w.scaling,
        "taps": sample.taps,
        "dropout": sample.dropout,
        "bits": sample.bits,
    }
    return tuple({**named, **changes}.values())


def together(first, second):
    """The arguments of two layers that read the first one's x."""
    one, two = arguments(first), arguments(second)
    lists = [[*one[k], *two[k]] for k in range(1, 7)]
    return (one[0], *lists, *one[7:])


@pytest.mark.parametrize("variant", ["plain", "fixed bits", "drawn bits", "norms", "black box"])
@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 0), ("is", 1), ("bs", 2), ("ms", 2)])
def test_opcheck(res_mode, pre_num, variant):
    sample = make_sample(
        res_mode,
        pre_num,
        2,
        leading=(2, 3),
        dropout=0.25 if variant == "fixed bits" else 0.0,
        dtype=torch.float32,
    )
    changes, kwargs = {}, {}
    if variant == "drawn bits":
        changes["dropout"] = 0.25
    if variant == "norms":
        kwargs = {"want_norms": True}
    if variant == "black box":
        changes.update(base_out=torch.randn(2, 3, 6, requires_grad=True))
    torch.library.opcheck(ADAPT, arguments(sample, **changes), kwargs)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck_of_layers_together(dropout):
    samples = [make_sample(mode, m, 2, dtype=torch.float32) for mode, m in [("is", 1), ("bs", 2)]]
    arguments = list(together(*samples))
    arguments[7] = dropout
    torch.library.opcheck(ADAPT, tuple(arguments), {"want_norms": True})


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 0), ("is", 1), ("bs", 2), ("ms", 2)])
def test_opcheck_of_the_backward(res_mode, pre_num, dropout):
    sample = make_sample(res_mode, pre_num, 2, dropout=dropout, dtype=torch.float32)
    outputs = [t.detach() for t in sample.call(*sample.differentiable())]
    named = dict(zip(("y", "s", "tap"), outputs, strict=False))
    x, bases, layout, A, B, scaling, _, dropout, bits = arguments(sample)
    given = [torch.randn_like(t) for t in named.values()] + [bases[0]]
    has = sum(1 << k for k in range(len(named))) + 8
    torch.library.opcheck(
        BACKWARD,
        (
            given,
            [has, layout[1], layout[2], layout[4]],
            x.detach(),
            [named["s"]],
            [t.detach() for t in A],
            [t.detach() for t in B],
            scaling,
            bits,
            dropout,
            [True] * 3,
        ),
    )


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (2, [1, 1, 1, 0], "5 integers for each member; got 4"),
        (2, [3, 1, 1, 0, 0], "kind of base, 0 to 2; got 3"),
        (2, [1, 2, 1, 0, 0], "layout must share out every list"),
        (2, [0, 1, 1, 0, 0], "layout must share out every list"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(place, change, message):
    wrong = list(arguments(make_sample("none", 0, 0)))
    wrong[place] = change
    with pytest.raises(ValueError, match=message):
        ADAPT(*wrong)


def test_opcheck_of_the_norm_ring():
    ring, count = torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(torch.ops.reslora.record_norms.default, (torch.ones(2), ring, count))


def chain_forward(chain, weights, A, B, x, dropout=0.0):
    taps = {}
    for n in range(chain.size):
        w = chain.wiring(n)
        y, s, tap = adapt(
            x,
            weights[n],
            None,
            None,
            [A[k] for k in w.a],
            [B[k] for k in w.b],
            w.scaling,
            [taps[k] for k in w.taps],
            dropout,
            None,
            w.handed == "tap" and len(w.a) == len(w.b),
        )[:3]
        taps[n] = s if w.handed == "s" else tap
        x = torch.tanh(y)
    return x


@pytest.mark.parametrize(
    ("res_mode", "pre_num"), [("none", 0), ("is", 1), ("bs", 2), ("ms", 2), ("ms", -1)]
)
def test_compiled_chain_equals_eager(res_mode, pre_num):
    """Three layers, one full graph, forward and backward; then another number of tokens."""
    torch.manual_seed(0)
    chain = make_chain(res_mode, pre_num, length=3)
    weights = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]
    A = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    B = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    plans = [chain.wiring(n) for n in range(3)]

    class Plain:  # Dynamo reads plain objects, not those of an extension module
        size = 3

        def __init__(self):
            self.plans = [
                type("W", (), {k: getattr(w, k) for k in ("a", "b", "scaling", "taps", "handed")})
                for w in plans
            ]

        def wiring(self, n):
            return self.plans[n]

    plain = Plain()

    def run(x, A, B):
        return chain_forward(plain, weights, A, B, x)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
        eager, traced = run(x, A, B), compiled(x, A, B)
        torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-10)
        direction = torch.randn_like(eager)
        want = torch.autograd.grad((eager * direction).sum(), [x, *A, *B])
        have = torch.autograd.grad((traced * direction).sum(), [x, *A, *B])
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_compiled_calls_draw_their_own_masks():
    """The op is tagged as drawing: two equal calls in one graph must not share a mask."""
    assert torch.Tag.nondeterministic_seeded in ADAPT.tags
    A, B, W = [torch.randn(4, 64)], [torch.randn(64, 4)], torch.randn(64, 64)

    @torch.compile(fullgraph=True)
    def twice(x):
        first = adapt(x, W, None, None, A, B, [1.0], [], 0.5)[3]
        second = adapt(x, W, None, None, A, B, [1.0], [], 0.5)[3]
        return first, second

    first, second = twice(torch.randn(16, 64))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("use_compile", [False, True])
def test_checkpointing_redraws_the_same_mask(use_compile):
    torch.manual_seed(0)
    W = torch.randn(32, 32) / 30  # tanh stays far from saturation: the slopes tell s apart
    A = torch.randn(4, 32, requires_grad=True)
    B = (torch.randn(32, 4) / 30).requires_grad_()

    def layer(x):
        return torch.tanh(adapt(x, W, None, None, [A], [B], [1.0], [], 0.5)[0])

    def run(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    # y is linear in B given the mask: its gradient tells which mask the backward used.
    run = torch.compile(run, fullgraph=True) if use_compile else run
    x = torch.randn(8, 32, requires_grad=True)
    y = run(x)
    (dB,) = torch.autograd.grad(y.sum(), B)
    slope = 1 - y.detach() ** 2
    # The s that the backward used solves dB = slope^T s; with the forward's mask it reproduces y.
    s = torch.linalg.lstsq(slope.T.double(), dB.double()).solution
    again = torch.tanh(x.double() @ W.T.double() + s @ B.T.double())
    torch.testing.assert_close(again.float(), y, rtol=1e-2, atol=1e-2)


def test_export_keeps_the_op_and_round_trips(tmp_path):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W = torch.nn.Parameter(torch.randn(6, 6), requires_grad=False)
            self.A = torch.nn.Parameter(torch.randn(2, 6))
            self.B = torch.nn.Parameter(torch.randn(6, 2))

        def forward(self, x):
            return adapt(x, self.W, None, None, [self.A], [self.B], [0.5], [])[0]

    layer, x = Layer().eval(), torch.randn(3, 6)
    program = torch.export.export(layer, (x,)).run_decompositions({})
    assert any(node.target is ADAPT for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    torch.testing.assert_close(loaded.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_base_and_keeps_fp32_gradients(dtype):
    x = torch.randn(4, 6, requires_grad=True)
    W, bias = torch.randn(6, 6), torch.randn(6)
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = adapt(x, W, bias, None, [A], [B], [1.0], [])[0]
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == A.grad.dtype == B.grad.dtype == torch.float32
    plain = torch.nn.functional.linear(x, W, bias) + x @ A.T @ B.T
    torch.testing.assert_close(y.float(), plain, rtol=0.1, atol=0.1)


def test_no_grad_and_inference_mode_save_nothing():
    sample = make_sample("is", 1, 1)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = sample.call(*sample.differentiable())[0]
        assert y.grad_fn is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_saved_bytes(res_mode, pre_num, dropout):
    """Beyond x by reference and the parameters: S (T x R x 4 bytes) and T*in/8 bytes of mask."""
    T, features, r = 64, 48, 8
    sample = make_sample(
        res_mode, pre_num, 2, r=r, leading=(T,), features=features, dtype=torch.float32
    )
    sample.dropout = dropout
    known = {
        t.untyped_storage().data_ptr() for t in [sample.x, sample.weight, *sample.A, *sample.B]
    }
    extra = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            extra[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = sample.call(*sample.differentiable())[0]
    R = r * len(sample.wiring.b)
    assert sum(extra.values()) <= T * R * 4 + (T * features // 8 if dropout else 0)
    assert y.grad_fn is not None


def test_meta_tensors_give_shapes():
    x = torch.randn(2, 3, 6, device="meta")
    A, B = [torch.randn(4, 6, device="meta")] * 2, [torch.randn(5, 4, device="meta")]
    y, s, tap, bits, _ = adapt(
        x, torch.randn(5, 6, device="meta"), None, None, A, B, [1.0], [], 0.1
    )
    assert y.shape == (2, 3, 5)
    assert s.shape == tap.shape == (2, 3, 4)
    assert bits.shape == (6, 1)


def test_foreign_rows_on_meta_are_refused():
    A = [torch.randn(4, 6), torch.randn(4, 6, device="meta")]
    with pytest.raises((ValueError, RuntimeError), match=r"meta|device"):
        adapt(torch.randn(3, 6), torch.randn(5, 6), None, None, A, [torch.randn(5, 4)], [1.0], [])


@pytest.mark.parametrize("choice", ["aten", "wrong"])
def test_the_form_of_other_devices(choice):
    """RESLORA_KERNELS=aten runs on the CPU what CUDA and MPS run; it passes the value tests."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    chosen = "(literal or gradcheck or dropout or norms or bits or narrow) and not threads"
    command += [str(here / "test_ops.py"), "-k", chosen]
    command += ["-x"] if choice == "wrong" else []
    result = subprocess.run(
        command,
        env={**os.environ, "RESLORA_KERNELS": choice},
        capture_output=True,
        text=True,
        check=False,
    )
    if choice == "wrong":
        assert "RESLORA_KERNELS must be auto, fused or aten; got wrong" in result.stdout
    else:
        assert result.returncode == 0, result.stdout[-3000:]
