"""Are the op's results on this device as near to fp64 as plain torch's in the same type?

Outputs, gradients and norms in bf16 and fp16 against the formulas in fp64, beside the error of
plain torch (bound: twice that error, three times for gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from session import Session
from torch import Tensor

from reslora import _C
from reslora.nn import ops

# tokens, in, out, r: tails in every dimension, every width of tiles
CASES = [
    (1, 768, 768, 16),
    (130, 776, 520, 9),
    (257, 1024, 1000, 64),
    (64, 100, 36, 3),
    (300, 1101, 1030, 24),
    (200, 520, 264, 128),
]
KEEP = 0.75
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NORMS_BOUND = 0.01


def errors_of(case: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return relative errors of y, dx, dA, dB: ours and plain torch's; and those of our norms."""
    tokens, width, out, r = case
    torch.manual_seed(0)
    sizes = [(tokens, width), (out, width), (out,), (r, width), (out, r), (tokens, out)]
    made = [torch.randn(size, dtype=torch.float64) / size[-1] ** 0.5 for size in sizes]
    low = [t.to(device, dtype) for t in made]
    exact = [t.to(torch.float64).cpu() for t in low]  # what the low-precision numbers stand for
    bits = torch.randint(0, 256, (tokens, -(-width // 8)), dtype=torch.uint8)
    kept = ((bits[:, :, None] >> torch.arange(8)) & 1).reshape(tokens, -1)[:, :width] / KEEP
    norms: list[Tensor] = []

    def run(form: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        x, W, b, A, B, dy = tensors
        x, A, B = (t.detach().requires_grad_() for t in (x, A, B))
        y = form(x, W, b, A, B)
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], dy)]

    def literal(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        alone = _C.formulas.Block(torch.zeros_like(W), None, A, B, 0.5)
        low_rank = _C.formulas.forward_none(alone, x * kept)
        return torch.nn.functional.linear(x, W, b) + low_rank

    def ours(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        member = ops.member(W, b, None, [A], [B], [0.5])
        options = {"dropout": 1 - KEEP, "bits": bits.to(device), "want_norms": True}
        found = ops.adapt(x, [member], **options)
        norms.append(found[-1].double().cpu())
        return found[0]

    def plain(x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        masked = x * kept.to(device, x.dtype)
        return torch.nn.functional.linear(x, W, b) + 0.5 * (masked @ A.T) @ B.T

    wanted = run(literal, exact)
    errors: dict[str, Any] = {}
    for name, form in (("ours", ours), ("plain", plain)):
        got = run(form, low)
        errors[name] = [
            float((g.double().cpu() - w).norm() / w.norm())
            for g, w in zip(got, wanted, strict=True)
        ]
    x, A = exact[0], exact[3]
    right = torch.stack([x.norm(), ((x * kept) @ A.T).norm()])
    errors["norms"] = ((norms[0] - right) / right).abs().tolist()
    return errors


def faults(errors: dict[str, Any]) -> list[str]:
    """Return which bounds do not hold."""
    found = []
    names = ("y", "dx", "dA", "dB")
    for name, own, other in zip(names, errors["ours"], errors["plain"], strict=True):
        bound = (2 if name == "y" else 3) * other + 1e-6
        if not own <= bound:
            found.append(f"the error of {name} must be at most {bound:.2e}; got {own:.2e}")
    if not max(errors["norms"]) <= NORMS_BOUND:
        found.append(f"norms must be right to {NORMS_BOUND}; got errors {errors['norms']}")
    return found


def run(session: Session) -> None:
    """Compare every case; fail at the end where a bound does not hold."""
    wrong = 0
    for case in CASES:
        for name, dtype in DTYPES.items():
            errors = errors_of(case, dtype, session.device)
            found = faults(errors)
            session.record({"shape": case, "dtype": name, **errors, "faults": found})
            wrong += bool(found)
    session.say(f"numerics hold in {2 * len(CASES) - wrong} of {2 * len(CASES)} cases")
    if wrong:
        raise AssertionError(f"[numerics] {wrong} cases are off; gpu.json has them")
