"""The op `adapt`: values against the literal formulas, gradients, contracts with the dispatcher."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from samples import (
    LAYOUTS,
    LENGTH,
    SHORTCUTS,
    adapt,
    contiguous,
    expanded,
    make_chain,
    make_sample,
    unpack_bits,
)

from reslora import _C

F64 = torch.float64
record_norms = torch.ops.reslora.record_norms

# ---------------------------------------------------------------- values


def literal_forward(chain, n, blocks, xs):
    mode, m = chain.shortcut, chain_m(chain)
    blocks = [_C.formulas.Block(*block) for block in blocks]
    if mode == "none" or m == 0:
        return _C.formulas.forward_none(blocks[n], xs[n])
    if mode == "is":
        return _C.formulas.forward_is(blocks[n], xs[n], xs[n - 1] if n else xs[n])
    if mode == "bs":
        return _C.formulas.forward_bs(blocks, n, m, xs[n])
    return _C.formulas.forward_ms(blocks, n, m, xs)


def chain_m(chain):
    return chain.pre_num_for_test


def run_chain(chain, blocks, x, *, dtype=F64):
    """Evaluate a chain by taps, tanh between layers; returns each layer's input and output."""
    taps, xs, ys = {}, [], []
    for n in range(chain.size):
        w = chain.wiring(n)
        keep = w.handed == "tap" and len(w.a) == len(w.b)
        y, s, tap = adapt(
            x,
            blocks[n][0],
            blocks[n][1],
            None,
            [blocks[k][2] for k in w.a],
            [blocks[k][3] for k in w.b],
            w.scaling,
            [taps[k] for k in w.taps],
            0.0,
            None,
            keep,
        )[:3]
        taps[n] = {"nothing": None, "s": s, "tap": tap}[w.handed]
        xs.append(x)
        ys.append(y)
        x = torch.tanh(y)
    return xs, ys


class ChainWithM:
    """A chain that remembers its m, for the literal formulas."""

    def __init__(self, chain, m):
        self._chain, self.pre_num_for_test = chain, m

    def __getattr__(self, name):
        return getattr(self._chain, name)


def make_blocks(features, r, length=LENGTH, dtype=F64, bias=True):
    return [
        (
            torch.randn(features, features, dtype=dtype),
            torch.randn(features, dtype=dtype) if bias else None,
            torch.randn(r, features, dtype=dtype).requires_grad_(),
            torch.randn(features, r, dtype=dtype).requires_grad_(),
            0.5 + n,
        )
        for n in range(length)
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 3), (2, 1, 3, 2), (1,), (0,), ()])
@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
def test_taps_equal_the_literal_formula(res_mode, pre_num, leading, bias):
    """Every shortcut, every m, every place in the chain: y and all gradients in fp64."""
    chain = ChainWithM(make_chain(res_mode, pre_num), pre_num)
    blocks = make_blocks(6, 4, bias=bias)
    x = torch.randn(*leading, 6, dtype=F64, requires_grad=True)
    parameters = [x] + [b[k] for b in blocks for k in (2, 3)]

    _, ys = run_chain(chain, blocks, x)
    xs, literal = [x], []
    for n in range(LENGTH):
        literal.append(literal_forward(chain, n, blocks, xs))
        xs.append(torch.tanh(literal[-1]))
    for n in range(LENGTH):
        torch.testing.assert_close(ys[n], literal[n], rtol=1e-12, atol=1e-12)

    direction = torch.randn_like(ys[-1])
    fast = torch.autograd.grad((ys[-1] * direction).sum(), parameters)
    slow = torch.autograd.grad((literal[-1] * direction).sum(), parameters)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layouts_do_not_matter(layout, dropout):
    sample = make_sample("is", 1, 1, layout=layout, leading=(2, 3), dropout=dropout, features=9)
    dense = [t.detach().contiguous().requires_grad_() for t in sample.differentiable()]
    direction = layout((2, 3, 9), dtype=F64)
    grads = []
    for tensors in (sample.differentiable(), dense):
        y, _, tap = sample.call(*tensors)
        grads.append(torch.autograd.grad((y * direction).sum() + tap.sum(), tensors))
        # sum() hands a gradient of stride 0 to the op.
    sample_weight, sample.weight = sample.weight, sample.weight.contiguous()
    y_dense = sample.call(*dense)[0]
    sample.weight = sample_weight
    torch.testing.assert_close(sample.call(*sample.differentiable())[0], y_dense)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ranks", [[1, 9, 4, 16], [8, 8, 3, 3]])
@pytest.mark.parametrize("res_mode", ["is", "bs"])
def test_ranks_may_differ_within_a_chain(res_mode, ranks):
    chain = ChainWithM(make_chain(res_mode, 2, ranks=ranks), 2)
    blocks = [
        (W, b, torch.randn(r, 6, dtype=F64), torch.randn(6, r, dtype=F64), s)
        for (W, b, _, _, s), r in zip(make_blocks(6, 4), ranks, strict=True)
    ]
    x = torch.randn(3, 6, dtype=F64)
    xs, ys = run_chain(chain, blocks, x)
    for n in range(LENGTH):
        torch.testing.assert_close(ys[n], literal_forward(chain, n, blocks, xs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 0), ("is", 1), ("bs", 3), ("ms", -1)])
def test_low_precision_error_is_bounded_by_plain_aten(res_mode, pre_num, dtype):
    """At most 2x the error of the plain ATen path in the same dtype; 3x for gradients."""
    torch.manual_seed(1)
    chain = ChainWithM(make_chain(res_mode, pre_num, features=64, r=8), pre_num)
    exact = [
        (
            (torch.randn(64, 64) / 8).to(dtype).double(),
            torch.randn(64).to(dtype).double(),
            (torch.randn(8, 64) / 8).to(dtype).double().requires_grad_(),
            (torch.randn(64, 8) / 3).to(dtype).double().requires_grad_(),
            0.5,
        )
        for _ in range(LENGTH)
    ]
    x = torch.randn(256, 64).to(dtype).double().requires_grad_()
    n = LENGTH - 1

    def through(dtype, evaluate):
        cast = [
            (W.to(dtype), b.to(dtype), A.detach().to(dtype).requires_grad_(),
             B.detach().to(dtype).requires_grad_(), s)
            for W, b, A, B, s in exact
        ]  # fmt: skip
        x_cast = x.detach().to(dtype).requires_grad_()
        y = evaluate(cast, x_cast)
        grads = torch.autograd.grad(y.sum(), [x_cast, cast[n][2], cast[n][3]])
        return [y.detach().double()] + [g.double() for g in grads]

    def fast(blocks, x):
        return run_chain(chain_05, blocks, x)[1][n]

    def literal(blocks, x):
        xs = [x]
        for k in range(n):
            xs.append(torch.tanh(literal_forward(chain, k, blocks, xs)))
        return literal_forward(chain, n, blocks, xs)

    layers = [_C.LayerShape(f"layers.{k}", 64, 64, 8, 0.5) for k in range(LENGTH)]
    chain_05 = _C.Chain(json.dumps({"r": 8, "res_mode": res_mode, "pre_num": pre_num}), layers)
    truth = through(F64, literal)
    for name, mine, plain, true in zip(
        ["y", "dx", "dA", "dB"], through(dtype, fast), through(dtype, literal), truth, strict=True
    ):
        bound = 2 if name == "y" else 3
        ulp = torch.finfo(dtype).eps * true.abs().max() * 0.5
        error, allowed = (mine - true).abs().max(), (plain - true).abs().max()
        assert error <= bound * allowed + ulp, f"{name}: {error:.3g} > {bound} x {allowed:.3g}"


def test_base_out_replaces_the_weight():
    sample = make_sample("is", 1, 1)
    y = sample.call(*sample.differentiable())[0]
    base_out = torch.nn.functional.linear(sample.x, sample.weight, sample.bias)
    sample.base_out = base_out.detach()
    torch.testing.assert_close(sample.call(*sample.differentiable())[0], y)


def test_adapters_keep_their_dtype_beside_a_low_precision_base():
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(5, 6, dtype=torch.bfloat16)
    A = torch.randn(2, 6, requires_grad=True)
    B = torch.randn(5, 2, dtype=F64, requires_grad=True)
    y = adapt(x, W, None, None, [A], [B], [1.0], [])[0]
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert A.grad.dtype == torch.float32
    assert B.grad.dtype == F64


# ---------------------------------------------------------------- dropout


def test_dropout_keeps_the_expected_share_and_scales():
    x = torch.ones(2000, 70, dtype=F64)
    A, B = [torch.ones(1, 70, dtype=F64)], [torch.ones(1, 1, dtype=F64)]
    W = torch.zeros(1, 70, dtype=F64)
    torch.manual_seed(3)
    _, s, _, bits, _ = adapt(x, W, None, None, A, B, [1.0], [], 0.3)
    mask = unpack_bits(bits, 70)
    assert abs(mask.double().mean().item() - 0.7) < 0.005
    torch.testing.assert_close(s[:, 0], mask.double().sum(1) / 0.7, rtol=1e-4, atol=0)
    # No element, row or column is favoured.
    assert (mask.double().mean(0) - 0.7).abs().max() < 0.06
    assert abs(torch.corrcoef(mask[:, :2].T.double())[0, 1].item()) < 0.1


def test_dropout_follows_manual_seed_and_threads():
    x = torch.randn(300, 40)
    args = (
        x,
        torch.randn(40, 40),
        None,
        None,
        [torch.randn(4, 40)],
        [torch.randn(40, 4)],
        [1.0],
        [],
    )
    drawn = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(7)
            drawn.append(adapt(*args, 0.5)[3])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], adapt(*args, 0.5)[3])


def test_given_bits_are_the_mask():
    sample = make_sample("ms", 2, 2, dropout=0.25, leading=(4,), features=13)
    mask = unpack_bits(sample.bits, 13).double() / 0.75
    _, s, _ = sample.call(*sample.differentiable())
    u = (sample.x * mask) @ sample.A[0].T
    torch.testing.assert_close(s, u + sum(sample.taps))


def test_dropped_infinities_do_not_poison():
    x = torch.full((1, 8), float("inf"))
    bits = torch.zeros(1, 1, dtype=torch.uint8)
    A, B = [torch.ones(1, 8)], [torch.ones(1, 1)]
    s = adapt(x, torch.ones(1, 8), None, None, A, B, [1.0], [], 0.5, bits)[1]
    assert s.item() == 0


# ---------------------------------------------------------------- gradients

GRAD_LAYOUTS = [
    layout for layout in LAYOUTS if layout is not expanded
]  # gradcheck wants no overlap
GRADCHECK = [
    (mode, m, place, bias, dropout, r, GRAD_LAYOUTS[i % len(GRAD_LAYOUTS)])
    for i, ((mode, m), place, bias, dropout, r) in enumerate(
        itertools.product(
            [s for s in SHORTCUTS if s not in [("ms", 0), ("bs", 7), ("ms", 7)]],
            [0, 1, 3],
            [True, False],
            [0.0, 0.3],
            [1, 4, 8, 9],
        )
    )
]


@pytest.mark.parametrize(("res_mode", "pre_num"), sorted({c[:2] for c in GRADCHECK}))
def test_gradcheck(res_mode, pre_num):
    """384 configurations in all: place x bias x dropout x rank, layouts in turn."""
    torch.manual_seed(0)
    cases = [c for c in GRADCHECK if c[:2] == (res_mode, pre_num)]
    assert len(cases) == 48
    for _, _, place, bias, dropout, r, layout in cases:
        sample = make_sample(
            res_mode, pre_num, place, r=r, bias=bias, dropout=dropout, layout=layout, leading=(3,)
        )
        assert torch.autograd.gradcheck(
            sample.call, sample.differentiable(), fast_mode=r > 4, nondet_tol=0.0
        ), (place, bias, dropout, r, layout.__name__)


def test_gradcheck_of_a_black_box_base():
    sample = make_sample("is", 1, 1, r=2)
    base_out = torch.randn(3, 6, dtype=F64, requires_grad=True)

    def call(base_out, *tensors):
        sample.base_out = base_out
        return sample.call(*tensors)

    assert torch.autograd.gradcheck(call, [base_out, *sample.differentiable()])


@pytest.mark.parametrize("frozen", ["x", "A", "B", "taps"])
def test_what_needs_no_gradient_gets_none(frozen):
    sample = make_sample("is", 1, 1)
    wanted = {"x": [sample.x], "A": sample.A, "B": sample.B, "taps": sample.taps}
    for t in wanted[frozen]:
        t.requires_grad_(False)
    y = sample.call(*sample.differentiable())[0]
    others = [t for key, ts in wanted.items() if key != frozen for t in ts]
    grads = torch.autograd.grad(y.sum(), others, allow_unused=True)
    for key_tensor, grad in zip(others, grads, strict=True):
        is_tap_rows = any(key_tensor is a for a in sample.A[1:])
        assert grad is not None
        assert is_tap_rows == bool((grad == 0).all())


def test_gradients_through_s_and_tap_alone():
    """A layer whose y nobody reads still trains through what it hands on."""
    sample = make_sample("is", 1, 1)
    _, _, tap = sample.call(*sample.differentiable())
    dx, dA = torch.autograd.grad(tap.sum(), [sample.x, sample.A[1]])
    expected = sample.A[1].detach().sum(0).expand(3, 6)
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(dA, sample.x.detach().sum(0).expand(4, 6))


@pytest.mark.parametrize(("res_mode", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_second_backward_is_refused(res_mode, pre_num, dropout):
    sample = make_sample(res_mode, pre_num, 1, dropout=dropout, layout=contiguous)
    y = sample.call(*sample.differentiable())[0]
    (dx,) = torch.autograd.grad(y.pow(2).sum(), sample.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second backward"):
        dx.sum().backward()


def test_torch_func_is_refused():
    sample = make_sample("none", 0, 0)
    A, B = [a.detach() for a in sample.A], [b.detach() for b in sample.B]

    def f(x):
        return adapt(x, sample.weight, None, None, A, B, [1.0], [])[0]

    x = sample.x.detach()
    for transform in (
        lambda: torch.func.grad(lambda x: f(x).sum())(x),
        lambda: torch.vmap(f)(x.unsqueeze(0)),
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: torch.func.jacrev(f)(x),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            transform()
    f(x.clone().requires_grad_()).sum().backward()  # and works again afterwards


# ---------------------------------------------------------------- norms


def test_norms_are_recorded_in_a_ring():
    norms, count = torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64)
    A, B = torch.randn(2, 6), torch.randn(6, 2)
    expected = []
    for k in range(5):
        x = torch.randn(4, 6) * (k + 1)
        measured = adapt(x, torch.eye(6), None, None, [A], [B], [1.0], [], want_norms=True)[4]
        record_norms(measured, norms, count)
        expected.append([x.norm(), (x @ A.T).norm()])
    assert count.item() == 5
    torch.testing.assert_close(norms, torch.tensor([expected[3], expected[4], expected[2]]).T)


def test_recording_bumps_the_version_and_changes_no_output():
    sample = make_sample("is", 1, 0)
    w = sample.wiring
    args = (sample.x, sample.weight, sample.bias, None, sample.A, sample.B, w.scaling, [])
    norms, count = torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64)
    before = norms._version, count._version
    *outputs, measured = adapt(*args, want_norms=True)
    record_norms(measured, norms, count)
    assert not measured.requires_grad
    assert norms._version > before[0]
    assert count._version > before[1]
    for a, b in zip(outputs, adapt(*args)[:4], strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- bad input

GOOD = {
    "x": torch.randn(3, 6),
    "weight": torch.randn(5, 6),
    "bias": torch.randn(5),
    "base_out": None,
    "A": [torch.randn(2, 6)],
    "B": [torch.randn(5, 2)],
    "scaling": [1.0],
    "taps": [],
}
BAD = [
    ({"x": torch.randn(3, 7)}, "in_features"),
    ({"x": torch.randn(3, 6).long()}, "floating point"),
    ({"x": torch.randn(3, 6).double()}, "one dtype"),
    ({"x": torch.randn(3, 6, device="meta")}, "device"),
    ({"weight": None}, "either weight or base_out"),
    ({"base_out": torch.randn(3, 5)}, "either weight or base_out"),
    ({"weight": None, "bias": None, "base_out": torch.randn(4, 5)}, "leading dimensions"),
    ({"bias": torch.randn(6)}, "bias must be"),
    ({"A": []}, "as many A as B"),
    ({"A": [torch.randn(2, 6)] * 3}, "as many A as B"),
    ({"A": [torch.randn(2, 7)]}, "in_features"),
    ({"A": [torch.ones(2, 6, dtype=torch.int32)]}, "in_features"),
    ({"B": [torch.randn(5, 3)]}, r"B must be \[out, r\]"),
    ({"B": [], "scaling": []}, "as many A as B"),
    ({"scaling": []}, "one scaling"),
    ({"taps": [torch.randn(3, 3)]}, "a tap must have"),
    ({"taps": [torch.randn(4, 2)]}, "a tap must have"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ({"dropout": 0.5, "bits": torch.zeros(3, 2, dtype=torch.uint8)}, "bits must be"),
    ({"bits": torch.zeros(3, 1, dtype=torch.uint8)}, "bits must be"),
    ({"A": [torch.randn(2, 6), torch.randn(2, 6)], "keep_tap": True}, "one tap at most"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input_is_one_sentence(change, sentence):
    with pytest.raises((ValueError, RuntimeError), match=sentence) as error:
        adapt(**{**GOOD, **change})
    assert "[adapt]" in str(error.value)
    assert "Exception raised from" not in str(error.value)


@pytest.mark.parametrize(
    ("norms", "ring", "count"),
    [
        (torch.zeros(3), torch.zeros(2, 4), torch.zeros(1).long()),
        (torch.zeros(2), torch.zeros(3, 4), torch.zeros(1).long()),
        (torch.zeros(2), torch.zeros(2, 0), torch.zeros(1).long()),
        (torch.zeros(2), torch.zeros(4, 2).T, torch.zeros(1).long()),
        (torch.zeros(2), torch.zeros(2, 4).double(), torch.zeros(1).long()),
        (torch.zeros(2), torch.zeros(2, 4), torch.zeros(1)),
    ],
)
def test_a_bad_ring_is_refused(norms, ring, count):
    with pytest.raises(ValueError, match=r"\[record_norms\]"):
        record_norms(norms, ring, count)


def test_trainable_base_is_refused():
    weight = torch.randn(5, 6, requires_grad=True)
    with pytest.raises(ValueError, match="base_out"):
        adapt(**{**GOOD, "weight": weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_no_rows_with_dropout_give_no_rows(dtype):
    A, B = torch.zeros(2, 8, dtype=dtype), torch.zeros(4, 2, dtype=dtype)
    x, W = torch.zeros(0, 8, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    y, s, _, bits, _ = adapt(x, W, None, None, [A], [B], [1.0], [], 0.5, None, False)
    assert y.shape == (0, 4) and s.shape == (0, 2) and bits.shape == (0, 1)


@pytest.mark.parametrize("scaling", [[0.3, 0.7], [0.3, 0.3]])
def test_narrow_factors_are_scaled_in_the_type_of_x(scaling):
    x = torch.randn(64, 32)
    A = [torch.randn(4, 32).bfloat16() for _ in range(2)]
    B = [torch.randn(16, 4).bfloat16() for _ in range(2)]
    y = adapt(x, None, None, torch.zeros(64, 16), A, B, scaling, [], 0.0, None, False)[0]
    exact = sum(
        scale * (x.double() @ a.double().T) @ b.double().T
        for scale, a, b in zip(scaling, A, B, strict=True)
    )
    assert (y - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 49, 131])
@pytest.mark.parametrize(("res_mode", "pre_num"), [("none", 0), ("is", 1), ("bs", 2), ("ms", 2)])
@pytest.mark.parametrize(("features", "r"), [(203, 5), (1003, 37)])
def test_float32_equals_float64_at_every_number_of_rows(
    features, r, res_mode, pre_num, tokens, dropout
):
    """Few rows read A and B as they lie, more rows a stacked copy; threads share large ones."""
    torch.manual_seed(tokens)
    options = {"r": r, "leading": (tokens,), "features": features, "dropout": dropout}
    sample = make_sample(res_mode, pre_num, 2, dtype=torch.float32, **options)
    wide = make_sample(res_mode, pre_num, 2, dtype=F64, **options)
    wide.weight, wide.bias, wide.bits = sample.weight.double(), sample.bias.double(), sample.bits
    inputs = [t.detach().double().requires_grad_() for t in sample.differentiable()]
    got, want = sample.call(*sample.differentiable()), wide.call(*inputs)
    directions = [torch.randn_like(t) for t in got]
    have = torch.autograd.grad(got, sample.differentiable(), directions)
    expected = torch.autograd.grad(want, inputs, [t.double() for t in directions])
    for a, b in zip([*got, *have], [*want, *expected], strict=True):
        assert (a.double() - b).norm() <= 2e-6 * b.norm()
