"""The C++ formulas, chains and merge rules against NumPy written by hand from the paper.

Nothing here calls reslora to compute an expected value: 2x2 cases carry their numbers as literals,
and the merge rules are recomputed for chains of five layers.
"""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from reslora import _C

Block = _C.formulas.Block

W0, A0, B0, S0 = [[1.0, 2.0], [3.0, 4.0]], [[1.0, -1.0]], [[2.0], [1.0]], 0.5
W1, A1, B1, S1 = [[0.0, 1.0], [-1.0, 2.0]], [[3.0, 1.0]], [[1.0], [-2.0]], 2.0
BIAS1 = [10.0, 20.0]
X0, X1 = [[1.0, 2.0], [0.0, -1.0]], [[2.0, 1.0], [1.0, 1.0]]
RULES = ["input", "weight", "factored"]


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def two_blocks():
    first = Block(tensor(W0), None, tensor(A0), tensor(B0), S0)
    return [first, Block(tensor(W1), tensor(BIAS1), tensor(A1), tensor(B1), S1)]


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


# ---- 2x2 by hand: W_1 X1 = (1, 0), (1, 1); A_1 X1 = 7, 4; A_0 X1 = 1, 0; A_1 X0 = 5, -1;
# A_0 X0 = -1, 1


def test_forward_none_by_hand():
    y = _C.formulas.forward_none(two_blocks()[1], tensor(X1))
    close(y, [[11 + 14, 20 - 28], [11 + 8, 21 - 16]])


def test_forward_is_by_hand():
    y = _C.formulas.forward_is(two_blocks()[1], tensor(X1), tensor(X0))
    close(y, [[11 + 24, 20 - 48], [11 + 6, 21 - 12]])


def test_forward_is_first_layer_doubles_or_not():
    first = two_blocks()[0]
    # W_0 X0 = (5, 11), (-2, -4); s B_0 A_0 X0 = (-1, -0.5), (1, 0.5)
    close(_C.formulas.forward_is(first, tensor(X0), None), [[4, 10.5], [-1, -3.5]])
    close(_C.formulas.forward_is(first, tensor(X0), tensor(X0)), [[3, 10], [0, -3]])


def test_forward_bs_by_hand():
    y = _C.formulas.forward_bs(two_blocks(), 1, 1, tensor(X1))
    # layer 1 alone, and 0.5 * (1, 0) * (2, 1)
    close(y, [[25 + 1, -8 + 0.5], [19, 5]])


def test_forward_ms_by_hand():
    y = _C.formulas.forward_ms(two_blocks(), 1, 1, [tensor(X0), tensor(X1)])
    # A_1 X1 + A_0 X0 = 6, 5
    close(y, [[11 + 12, 20 - 24], [11 + 10, 21 - 20]])


def test_merged_weights_by_hand():
    blocks = two_blocks()
    delta1 = np.array([[6.0, 2.0], [-12.0, -4.0]])  # 2 B_1 A_1
    delta0 = np.array([[1.0, -1.0], [0.5, -0.5]])  # 0.5 B_0 A_0
    close(_C.formulas.merged_none(blocks[1]), np.array(W1) + delta1)
    close(_C.formulas.merged_is(blocks[1], 0.25), np.array(W1) + 1.25 * delta1)
    close(_C.formulas.merged_bs(blocks, 1, -1), np.array(W1) + delta1 + delta0)
    close(_C.formulas.merged_ms_input(blocks[1], [0.5]), np.array(W1) + 1.5 * delta1)
    # A_1 + 2 A_0 = (5, -1)
    close(
        _C.formulas.merged_ms_weight(blocks, 1, [2.0]),
        np.array(W1) + np.array([[10.0, -2.0], [-20.0, 4.0]]),
    )


def test_alpha_star_by_hand():
    assert _C.formulas.alpha_star_input(3.0, 2.0) == 1.5
    norms = [4.0, 2.0, 8.0, 5.0]
    assert _C.formulas.alpha_star_weight(norms, 3, 1) == 2.0 / 8.0
    assert _C.formulas.alpha_star_weight(norms, 3, 2) == 4.0 / 8.0
    assert _C.formulas.alpha_star_weight(norms, 3, 3) == 1.0


def test_formulas_are_differentiable():
    blocks = two_blocks()
    leaves = [t.requires_grad_() for block in blocks for t in (block.A, block.B)]

    def run(a0, b0, a1, b1, x0, x1):
        chain = [
            Block(blocks[0].W, None, a0, b0, S0),
            Block(blocks[1].W, blocks[1].bias, a1, b1, S1),
        ]
        y = _C.formulas.forward_ms(chain, 1, -1, [x0, x1])
        return y + _C.formulas.forward_is(chain[1], x1, x0)

    xs = (tensor(X0).requires_grad_(), tensor(X1).requires_grad_())
    assert torch.autograd.gradcheck(run, (*leaves, *xs))


# ---- merge rules on chains of five layers, against NumPy loops


def random_chain(mode, m, layers=5, features=4, r=2, seed=0, first_block="double"):
    """Return (Chain, W, A, B, scalings, norms [layer, 2, 3]); all but the chain in NumPy."""
    rng = np.random.default_rng(seed)
    W = [rng.normal(size=(features, features)) for _ in range(layers)]
    A = [rng.normal(size=(r, features)) for _ in range(layers)]
    B = [rng.normal(size=(features, r)) for _ in range(layers)]
    s = [0.5 + 0.1 * n for n in range(layers)]
    norms = rng.uniform(1, 5, size=(layers, 2, 3)).astype(np.float32)
    config = {"res_mode": mode, "pre_num": m, "first_block": first_block}
    shapes = [_C.LayerShape(f"l{n}", features, features, r, s[n]) for n in range(layers)]
    return _C.Chain(json.dumps(config), shapes), W, A, B, s, norms


def window(norms):
    return torch.from_numpy(norms), torch.tensor([7])


def views(W, A, B, norms):
    """Return the weights, and the views that hold them."""
    weights = [tensor(w) for w in W]
    return weights, [
        _C.LayerView(w, tensor(a), tensor(b), *window(f))
        for w, a, b, f in zip(weights, A, B, norms, strict=True)
    ]


def expected_merge(mode, m, rule, W, A, B, s, norms, first_block="double"):
    f = np.asarray(norms, dtype=np.float64).mean(axis=2)  # [layer, (|x|, |A x|)]
    merged = []
    for n in range(len(W)):
        reach = min(n, 1) if mode == "is" else (n if m == -1 else min(m, n))
        alphas = []
        for k in range(1, reach + 1):
            if rule == "weight" and n - k - 1 < 0:
                alphas.append(1.0)
            elif rule == "weight":
                alphas.append(np.linalg.norm(merged[n - k - 1]) / np.linalg.norm(merged[n - 1]))
            else:
                row = 1 if mode == "ms" and rule == "input" else 0
                alphas.append(f[n - k, row] / f[n, row])
        if mode == "is" and n == 0:
            alphas = [1.0] if first_block == "double" else []
        if mode == "ms" and rule != "input":
            down = A[n] + sum(a * A[n - k - 1] for k, a in enumerate(alphas))
            merged.append(W[n] + s[n] * B[n] @ down)
        else:
            merged.append(W[n] + s[n] * (1 + sum(alphas)) * B[n] @ A[n])
    return merged


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("mode", "m", "first_block"),
    [("is", 1, "double"), ("is", 1, "plain"), ("is", -1, "double")]
    + [("ms", m, "double") for m in (-1, 0, 1, 2, 3, 4, 99)],
)
def test_merge_rule_equals_numpy(mode, m, first_block, rule):
    chain, W, A, B, s, norms = random_chain(mode, m, first_block=first_block)
    weights, tensors = views(W, A, B, norms)
    _C.MergePlan([_C.ChainView(chain, tensors)], rule).apply()
    expected = expected_merge(mode, m, rule, W, A, B, s, norms, first_block)
    for weight, wanted in zip(weights, expected, strict=True):
        close(weight, wanted, 1e-11)


@pytest.mark.parametrize("m", [-1, 1, 2, 4])
def test_block_shortcut_merge_equals_numpy(m):
    chain, W, A, B, s, norms = random_chain("bs", m)
    weights, tensors = views(W, A, B, norms)
    _C.MergePlan([_C.ChainView(chain, tensors)], "").apply()
    for n, weight in enumerate(weights):
        first = 0 if m == -1 else max(0, n - m)
        close(weight, W[n] + sum(s[j] * B[j] @ A[j] for j in range(first, n + 1)), 1e-11)


# ---- the bindings themselves


def test_errors_are_one_sentence_of_the_right_type():
    with pytest.raises(ValueError, match=r"^\[config\] r must be at least 1; got 0$"):
        _C.Chain('{"r": 0}', [])
    with pytest.raises(ValueError, match=r"^\[merge\] merge_method must be .*; got 'best'$"):
        _C.MergePlan([], "best")
    for name in (3, ["lsq"], b"lsq", True):
        with pytest.raises(ValueError, match=r"^\[merge\] merge_method must be 'exact', .*; got"):
            _C.check_merge_method(name, "merge")
    chain = random_chain("is", 1)[0]
    for method in (chain.wiring, chain.reached, chain.is_linked, chain.merges_exactly):
        for n in (-1, 5):
            with pytest.raises(IndexError, match=rf"index of a layer; got {n} of 5 layers$"):
                method(n)
    with pytest.raises(ValueError, match=r"'input' or 'own_product'; got 'x'$"):
        _C.window_mean(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), "x")


def test_scaling_is_alpha_over_rank_or_its_root():
    assert _C.scaling_of(16, 4, False) == 4.0
    assert _C.scaling_of(16, 4, True) == 8.0


def test_window_mean_reads_what_was_written():
    norms = torch.tensor([[1.0, 3.0, 100.0], [10.0, 30.0, 1000.0]])
    assert _C.window_mean(norms, torch.tensor([0]), "input") is None
    assert _C.window_mean(norms, torch.tensor([2]), "input") == 2.0
    assert _C.window_mean(norms, torch.tensor([2]), "own_product") == 20.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_chain_survives_copy_and_pickle(duplicate):
    chain = _C.Chain(
        '{"res_mode": "ms", "pre_num": 2, "first_block": "plain", "detach_taps": true}',
        [
            _C.LayerShape(*x)
            for x in (("a", 4, 4, 2, 0.1), ("b", 4, 5, 2, 0.2), ("c", 4, 4, 3, 0.3))
        ],
    )
    twin = duplicate(chain)
    assert twin.config == chain.config
    assert twin.layers == chain.layers
    assert (
        twin.layers[0] != chain.layers[1] and twin.layers[0] != "a" and twin.layers[0] is not None
    )
    assert twin.wiring(1).taps == [0]
    assert twin.wiring(2).broken == chain.wiring(2).broken != []
    assert (len(twin), twin.shortcut) == (3, "ms")


def test_wiring_as_python_sees_it():
    wiring = random_chain("is", 1)[0].wiring(0)
    assert (wiring.a, wiring.b, wiring.taps) == ([0, 1], [0], [])
    assert (wiring.handed, wiring.is_doubled, wiring.broken) == ("tap", True, [])
    assert wiring.scaling == [1.0]
    with pytest.raises(AttributeError):
        wiring.handed = "s"
    summed = random_chain("ms", -1)[0]
    assert [summed.wiring(n).handed for n in range(5)] == ["s"] * 4 + ["nothing"]


def test_plan_reports_reverts_and_pads():
    chain, W, A, B, _, norms = random_chain("is", 1)
    weights, tensors = views(W, A, B, norms)
    before = [weight.clone() for weight in weights]
    plan = _C.MergePlan([_C.ChainView(chain, tensors)], "")
    assert not plan.fell_back_to_weight
    assert [layer.rule for layer in plan.layers] == ["exact"] + ["input"] * 4
    assert [len(layer.alpha_star) for layer in plan.layers] == [0, 1, 1, 1, 1]
    seen = []
    plan.apply(keep_originals=True, safe_merge=True, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    assert plan.is_applied
    plan.revert()
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    layer = plan.layers[2]
    wide_a, wide_b = _C.padded_factors(layer, 6)
    assert (wide_a.shape, wide_b.shape) == ((6, 4), (4, 6))
    torch.testing.assert_close(wide_b @ wide_a, layer.B @ layer.A)


def test_exception_of_the_progress_callback_undoes_the_merge():
    chain, W, A, B, _, norms = random_chain("is", 1)
    weights, tensors = views(W, A, B, norms)
    plan = _C.MergePlan([_C.ChainView(chain, tensors)], "weight")

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.apply(progress=stop)
    assert not plan.is_applied
    for weight, w in zip(weights, W, strict=True):
        assert torch.equal(weight, tensor(w))


def test_plan_follows_a_parameter_that_requires_grad_and_a_transposed_view():
    chain, W, A, B, s, _ = random_chain("none", 1, layers=2)
    parameter = torch.nn.Parameter(tensor(W[0]))
    stored = torch.nn.Parameter(tensor(W[1]).t().contiguous())
    tensors = [
        _C.LayerView(parameter, *(torch.nn.Parameter(tensor(x[0])) for x in (A, B))),
        _C.LayerView(stored.t(), tensor(A[1]), tensor(B[1])),
    ]
    _C.MergePlan([_C.ChainView(chain, tensors)], "exact").apply()
    assert parameter.requires_grad and parameter.is_leaf
    close(parameter, W[0] + s[0] * B[0] @ A[0])
    close(stored.t(), W[1] + s[1] * B[1] @ A[1])


class Wrapped(torch.Tensor):
    """A stand-in for quantised and distributed weights: a tensor that only dispatches."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} must not be called")


def test_merging_refuses_a_tensor_subclass_before_it_touches_anything():
    chain, W, A, B, _, norms = random_chain("is", 1)
    weights, tensors = views(W, A, B, norms)
    tensors[3] = _C.LayerView(Wrapped(weights[3]), tensor(A[3]), tensor(B[3]), *window(norms[3]))
    plan = _C.MergePlan([_C.ChainView(chain, tensors)], "input")
    with pytest.raises(ValueError, match=r"dequantise it first; .*tensor subclass \(layer l3\)$"):
        plan.apply()
    assert torch.equal(weights[0], tensor(W[0]))
