"""How long does each kernel take on the device, beside a copy and the GEMMs that it replaces?

Device time from a profiler's trace, inputs in turn so that no cache holds them. A kernel's GB/s
counts what it must read and write once; the copy's are those of a tensor of the same size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from session import Session, copies_of, device_seconds, randn

from reslora.nn import ops

# tokens, in, out, r
SHAPES = [
    (8192, 4096, 4096, 16),
    (8192, 4096, 14336, 16),
    (2048, 4096, 4096, 16),
    (512, 4096, 4096, 64),
]
# name: dropout, whether norms are wanted
FORMS = {"p 0.05": (0.05, False), "p 0.05, norms": (0.05, True), "p 0, norms": (0.0, True)}
# Those that every GPU's step with dropout takes up to rank 32 (above it expand_grad is ATen's).
EXPECTED = {"project_kernel", "project_grad_kernel", "expand_kernel", "expand_grad_kernel"}
BYTES = 2  # of an element


def minimal_bytes(kernel: str, shape: tuple[int, ...], has_bits: bool) -> int | None:
    """Return what a kernel must read and write once; None for one that this table has not."""
    tokens, width, out, r = shape
    thin, bits = BYTES * tokens * r, tokens * width // 8 if has_bits else 0
    return {
        "project_kernel": BYTES * (tokens + r) * width + bits + thin,
        "project_grad_kernel": BYTES * (tokens + r) * width + bits + thin,
        "expand_kernel": BYTES * (tokens + r) * width + bits + thin,
        "expand_grad_kernel": BYTES * (tokens + 2 * r) * out + 2 * thin,
    }.get(kernel)


class Tensors:
    """Inputs of a step, several of each wide one."""

    def __init__(self, session: Session, shape: tuple[int, ...]) -> None:
        tokens, width, out, r = shape
        self.count = copies_of(session, BYTES * tokens * min(width, out))
        self.xs = [randn(session, tokens, width) for _ in range(self.count)]
        self.dys = [randn(session, tokens, out) for _ in range(self.count)]
        self.W = randn(session, out, width)
        self.A, self.B = randn(session, r, width), randn(session, out, r)
        self.s = randn(session, tokens, r)

    def step(self, number: int, dropout: float, want_norms: bool) -> None:
        """Run forward and backward of the op."""
        x = self.xs[number % self.count].requires_grad_()
        A, B = (t.detach().requires_grad_() for t in (self.A, self.B))
        member = ops.member(self.W, None, None, [A], [B], [1.0])
        found = ops.adapt(x, [member], dropout=dropout, want_norms=want_norms)
        found[0].backward(self.dys[number % self.count])
        x.grad = None


@torch.no_grad()
def measure_references(session: Session, tensors: Tensors) -> dict[str, dict[str, float]]:
    """Return seconds and rates of copies and of the library's GEMMs."""
    (tokens, width), out = tensors.xs[0].shape, len(tensors.B)
    target_x, target_dy = torch.empty_like(tensors.xs[0]), torch.empty_like(tensors.dys[0])
    W, A, B, s = tensors.W, tensors.A, tensors.B, tensors.s
    x = lambda number: tensors.xs[number % tensors.count].detach()  # noqa: E731
    dy = lambda number: tensors.dys[number % tensors.count]  # noqa: E731
    by_x, by_dy = BYTES * tokens * width, BYTES * tokens * out
    works = {
        "copy of x": (lambda n: target_x.copy_(x(n)), 2 * by_x, 0),
        "copy of dy": (lambda n: target_dy.copy_(dy(n)), 2 * by_dy, 0),
        "x W^T": (lambda n: x(n) @ W.T, 0, 2 * tokens * width * out),
        "dy W": (lambda n: dy(n) @ W, 0, 2 * tokens * width * out),
        "x A^T (project)": (lambda n: x(n) @ A.T, by_x, 0),
        "s^T x (project_grad)": (lambda n: s.T @ x(n), by_x, 0),
        "s A (expand)": (lambda n: s @ A, by_x, 0),
        "dy B (expand_grad)": (lambda n: dy(n) @ B, by_dy, 0),
        "dy^T s (expand_grad)": (lambda n: dy(n).T @ s, by_dy, 0),
    }
    found = {}
    for name, (work, moved, operations) in works.items():
        seconds = sum(device_seconds(session, work).values())
        found[name] = {"microseconds": 1e6 * seconds}
        if moved:
            found[name]["GB/s"] = 1e-9 * moved / seconds
        if operations:
            found[name]["TFLOP/s"] = 1e-12 * operations / seconds
    return found


def rates(seconds: float, moved: int | None, copy: dict[str, float]) -> dict[str, Any]:
    """Return a kernel's time, its GB/s, and their share of the copy's."""
    row: dict[str, Any] = {"microseconds": 1e6 * seconds}
    if moved:
        row["GB/s"] = 1e-9 * moved / seconds
        row["share of copy"] = row["GB/s"] / copy["GB/s"]
    return row


def measure(session: Session, shape: tuple[int, ...]) -> set[str]:
    """Measure a shape; return the names of the kernels that ran."""
    tensors = Tensors(session, shape)
    references = measure_references(session, tensors)
    forms: dict[str, dict[str, dict[str, Any]]] = {}
    for form, (dropout, want_norms) in FORMS.items():
        work = partial(tensors.step, dropout=dropout, want_norms=want_norms)
        forms[form] = {}
        for key, seconds in device_seconds(session, work).items():
            name = key.removeprefix("reslora ")
            moved = minimal_bytes(name, shape, dropout > 0)
            copy = references["copy of dy" if name == "expand_grad_kernel" else "copy of x"]
            forms[form][name] = rates(seconds, moved, copy)
    session.record({"shape": shape, "references": references, "steps": forms})
    shares = {name: row.get("share of copy") for name, row in forms["p 0.05"].items()}
    told = [f"{name} {share:.0%}" for name, share in shares.items() if share]
    session.say(f"{shape}: copy {references['copy of x']['GB/s']:.0f} GB/s; {', '.join(told)}")
    return {name for rows in forms.values() for name in rows}


def run(session: Session) -> None:
    """Measure every shape; on a GPU fail where a kernel of ours did not run."""
    ran: set[str] = set()
    for full in SHAPES:
        ran |= measure(session, (*(session.size(n) for n in full[:3]), full[3]))
    missing = sorted(EXPECTED - ran)
    if session.is_cuda and missing:
        raise AssertionError(f"[kernels] every kernel must run; missing {missing}")
