"""Several threads that train one model at once, with checkpointing."""

import sys
import threading

import pytest
import torch
from models import LINKED, NON_REENTRANT, adapted, gradients, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

THREADS = 4
STEPS = 40  # of each thread


class Attention(nn.Module):
    """Three layers that are evaluated together, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return x + self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, **NON_REENTRANT)
        return x


@pytest.fixture(autouse=True)
def threads_that_switch_at_every_chance():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run(work):
    """Run `work(n)` in threads that begin at once; return the exceptions."""
    barrier, failures = threading.Barrier(THREADS), []

    def body(n):
        barrier.wait()
        try:
            work(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def inputs():
    return [
        torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in range(THREADS)
    ]


@pytest.mark.parametrize(("res_mode", "pre_num"), [*LINKED, ("bs", 1), ("none", 1)])
def test_each_thread_gets_the_gradients_of_its_own_forward(res_mode, pre_num):
    options = {"target_modules": ["q", "k", "v", "o"], "res_mode": res_mode, "pre_num": pre_num}
    model = adapted(Model().double(), 0.3, **options)
    xs = inputs()
    want = [gradients(model, x) for x in xs]
    wrong = []

    def work(n):
        for _ in range(STEPS):
            got = gradients(model, xs[n])
            if not all(map(torch.equal, got, want[n])):
                wrong.append(n)

    assert run(work) == [] and wrong == []


def test_backwards_of_forwards_of_other_threads():
    """Each forward is made in a thread of its own; one thread runs all the backwards."""
    model = adapted(Model().double(), 0.3, target_modules=["q", "k", "v", "o"], res_mode="ms")
    xs = inputs()
    want = [gradients(model, x) for x in xs]
    losses = {}

    def work(n):
        losses[n] = model(xs[n]).square().sum()

    assert run(work) == []
    for n in (2, 0, 3, 1):
        got = torch.autograd.grad(losses[n], trained(model))
        assert all(map(torch.equal, got, want[n]))
