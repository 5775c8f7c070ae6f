"""The op on every device: values near fp64, the kernels that ran, graphs, streams, equal bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from devices import assert_near, ran

from reslora.nn import ops

KERNELS = {"project", "project_grad", "expand"}  # of a step with dropout; to rank 32 expand_grad
KEEP = 0.75
BF16 = torch.bfloat16
SHARES = {BF16: 0.03, torch.float16: 0.004}  # of the largest element


def layer(device, dtype, r, members=1):
    """Make x with its bits, and weight, A and B of layers that read it, with tails everywhere."""
    generator = torch.Generator().manual_seed(r)

    def made(*shape):
        return (torch.randn(shape, generator=generator) * 0.2).to(device, dtype)

    bits = torch.randint(0, 256, (201, 25), dtype=torch.uint8, generator=generator).to(device)
    return made(3, 67, 200), bits, [(made(136, 200), made(r, 200), made(136, r))] * members


def step(x, bits, layers, dropout=1 - KEEP, want_norms=False):
    """Run forward and backward; return outputs, gradients of x, every A and B, and the norms."""
    x = x.detach().requires_grad_()
    members, trained = [], [x]
    for weight, A, B in layers:
        A, B = (t.detach().requires_grad_() for t in (A, B))
        members.append(ops.member(weight, None, None, [A], [B], [0.5]))
        trained += [A, B]
    found = ops.adapt(x, members, dropout=dropout, bits=bits, want_norms=want_norms)
    ys = found[: 3 * len(layers) : 3]
    loss = sum(y.square().sum() for y in ys)
    return [*(y.detach() for y in ys), *torch.autograd.grad(loss, trained)], found[-1]


def in_double(layers):
    return [tuple(t.double() for t in one) for one in layers]


@pytest.mark.parametrize("r", [8, 24, 64, 128, 130])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_step_is_near_to_fp64(device, dtype, r):
    x, bits, layers = layer(device, dtype, r)
    exact, _ = step(x.double(), bits, in_double(layers))
    (got, _), kernels = ran(device, lambda: step(x, bits, layers))
    assert_near(got, exact, SHARES[dtype])
    if device == "cuda" and r <= 128:
        assert kernels >= KERNELS | ({"expand_grad"} if r <= 32 else set())


@pytest.mark.parametrize(("r", "members"), [(8, 3), (64, 3)])
def test_layers_that_read_one_x_are_near_to_fp64_together(device, r, members):
    """Also with more than 128 rows of A in all."""
    x, bits, layers = layer(device, BF16, r, members)
    exact, _ = step(x.double(), bits, in_double(layers))
    (got, _), kernels = ran(device, lambda: step(x, bits, layers))
    assert_near(got, exact, SHARES[BF16])
    if device == "cuda" and r * members <= 128:
        assert kernels >= KERNELS


@pytest.mark.parametrize("dropout", [0.0, 1 - KEEP])
def test_norms_are_those_of_fp64_and_go_into_the_ring(device, dropout):
    x, bits, layers = layer(device, BF16, 16)
    given = bits if dropout else None
    _, want = step(x.double(), given, in_double(layers), dropout, True)
    (_, got), kernels = ran(device, lambda: step(x, given, layers, dropout, True))
    torch.testing.assert_close(got.double(), want.double(), rtol=0.01, atol=0)
    if device == "cuda":
        assert "project" in kernels
    ring = torch.zeros(2, 3, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(4):
        ops.record_norms(got, ring, count)
    assert count.item() == 4
    assert all(torch.equal(ring[:, n], got) for n in range(3))


def test_a_step_and_its_norms_in_a_graph_equal_the_eager_ones(cuda):
    x, bits, layers = layer(cuda, BF16, 16)
    ring = torch.zeros(2, 8, device=cuda)
    count = torch.zeros(1, dtype=torch.int64, device=cuda)

    def work():
        results, norms = step(x, bits, layers, want_norms=True)
        ops.record_norms(norms, ring, count)
        return results, norms

    want, norms = work()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, _ = work()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert_near(got, want)
    assert count.item() == 5
    assert_near([ring[:, n] for n in range(5)], [norms] * 5, 1e-3)


def test_equal_seeds_draw_equal_bits_and_as_many_as_asked(device):
    x, _, layers = layer(device, BF16, 8)
    members = [ops.member(weight, None, None, [A], [B], [0.5]) for weight, A, B in layers]

    def draw():
        return ops.adapt(x, members, dropout=1 - KEEP)[3]

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    third, kernels = ran(device, draw)
    assert torch.equal(third, first)
    assert not torch.equal(first, second)
    if device == "cuda":
        assert "project" in kernels
    kept = (first[:, :, None] >> torch.arange(8, device=device)) & 1
    assert abs(kept.double().mean().item() - KEEP) < 0.01  # 40200 coins: five deviations


def test_a_graph_draws_anew_in_each_replay(cuda):
    x, _, layers = layer(cuda, BF16, 8)
    members = [ops.member(weight, None, None, [A], [B], [0.5]) for weight, A, B in layers]
    ops.adapt(x, members, dropout=0.25)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = ops.adapt(x, members, dropout=0.25)[3]
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(drawn.clone())
    assert not torch.equal(*replays)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_equal_inputs_give_equal_bits(device, is_deterministic):
    x, bits, layers = layer(device, BF16, 24)
    torch.use_deterministic_algorithms(
        is_deterministic, warn_only=True
    )  # cuBLAS may want a variable
    try:
        runs = [step(x, bits, layers, want_norms=True) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for results, norms in runs[1:]:
        assert all(torch.equal(g, w) for g, w in zip(results, runs[0][0], strict=True))
        assert torch.equal(norms, runs[0][1])


def test_a_side_stream_gives_the_same_results(cuda):
    x, bits, layers = layer(cuda, BF16, 24)
    want, _ = step(x, bits, layers)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got, _ = step(x, bits, layers)
    torch.cuda.current_stream().wait_stream(stream)
    assert_near(got, want)


def test_another_device_than_the_current_one_gives_the_same_results(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("no CUDA device beside the first")
    x, bits, layers = layer(cuda, BF16, 24)
    want, _ = step(x, bits, layers)
    got, _ = step(*layer("cuda:1", BF16, 24))
    assert {str(g.device) for g in got} == {"cuda:1"}
    assert_near([g.to(cuda) for g in got], want)


@pytest.mark.parametrize("shift", [1, 3, 4])
def test_views_off_their_boundaries_are_near_to_fp64(device, shift):
    x, bits, layers = layer(device, BF16, 24)

    def shifted(t):
        """Return an equal tensor whose rows start `shift` elements into wider ones."""
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + shift)
        wide[..., shift:] = t
        return wide[..., shift:]

    views = [tuple(shifted(t) for t in one) for one in layers]
    exact, _ = step(x.double(), bits, in_double(layers))
    (got, _), kernels = ran(device, lambda: step(shifted(x), bits, views))
    assert_near(got, exact, SHARES[BF16])
    if device == "cuda":
        assert kernels >= KERNELS


def test_the_self_check_agrees_and_says_so(device):
    """In a process that has forced nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "reslora", "doctor", "--json"],
        env={**os.environ, "RESLORA_KERNELS": "auto"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)["kernels"]
    verdicts = {place: said for place, said in found.items() if place.startswith(device)}
    verdicts = {place: said for place, said in verdicts.items() if not place.endswith("float32")}
    assert len(verdicts) >= (2 if device == "cuda" else 1)
    assert {said.split(" (")[0] for said in verdicts.values()} == {"reslora's own"}


def test_more_elements_than_an_int_counts(cuda):
    if torch.cuda.get_device_properties(0).total_memory < 20 << 30:
        pytest.skip("no CUDA device with 20 GB")
    tokens, width = (1 << 20) + 3, 2056  # 2.16e9 elements, in rows that are aligned
    x = torch.zeros(tokens, width, dtype=BF16, device=cuda)
    rows = torch.tensor([0, tokens // 2, tokens - 1], device=cuda)
    x[rows] = torch.randn(3, width, device=cuda, dtype=BF16)
    weight, A, B = (
        torch.randn(shape, device=cuda, dtype=BF16) * 0.1
        for shape in ((8, width), (16, width), (8, 16))
    )
    bits = torch.full((tokens, width // 8), 0b01110111, dtype=torch.uint8, device=cuda)

    def results(x, bits):
        x, own_A, own_B = (t.detach().requires_grad_() for t in (x, A.to(x), B.to(x)))
        member = ops.member(weight.to(x), None, None, [own_A], [own_B], [0.5])
        y, *_, norms = ops.adapt(x, [member], dropout=1 - KEEP, bits=bits, want_norms=True)
        y = y[rows] if len(y) == tokens else y
        dx, dA, dB = torch.autograd.grad(y.double().square().sum(), [x, own_A, own_B])
        return [y, dx[rows] if len(dx) == tokens else dx, dA, dB, norms]

    # All other rows are zeros, so these are the results of three rows alone.
    assert_near(results(x, bits), results(x[rows].double(), bits[rows]), SHARES[BF16])
