"""RaSA: LoRA whose layers of one kind share a part of their ranks (arXiv 2503.12576).

For layer i of L layers of equal shape, r ranks a layer, k of which go to the shared pool:

    delta W_i = [B_i  B_S] diag(d_i) [A_i; A_S]

A_i (r-k x in) and B_i (out x r-k) are the layer's own; A_S (Lk x in) and B_S (out x Lk) belong to
all L layers; d_i (r-k+Lk) are weights of the layer. Definition: the paper's section on its method;
the first values of d_i, which hold the scale, are those of the authors' program: alpha / 2(r-k) for
the layer's own directions, alpha / 2Lk for the shared ones. B is zero at first. Trained are the
same A and B as with LoRA of rank r, and the r-k+Lk weights of each layer.

PEFT has no such method; this class is for the study alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class RasaPool(nn.Module):
    """The shared directions of the layers of one kind."""

    def __init__(self, shared_A: Tensor, outputs: int) -> None:
        super().__init__()
        self.A = nn.Parameter(shared_A)
        self.B = nn.Parameter(torch.zeros(outputs, len(shared_A), device=shared_A.device))


class RasaLinear(nn.Module):
    """A frozen linear layer with directions of its own and shared ones."""

    def __init__(self, base: nn.Linear, own_A: Tensor, pool: RasaPool, alpha: float) -> None:
        super().__init__()
        own, shared = len(own_A), len(pool.A)
        options = {"device": own_A.device}
        self.base, self.pool = base, pool
        self.A = nn.Parameter(own_A)
        self.B = nn.Parameter(torch.zeros(base.out_features, own, **options))
        scale = torch.full((own + shared,), alpha / (2 * shared), **options)
        scale[:own] = alpha / (2 * max(own, 1))
        self.d = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the adapter's; x: [..., in]."""
        A = torch.cat([self.A, self.pool.A])
        B = torch.cat([self.B, self.pool.B], 1)
        return self.base(x) + linear(linear(x, A) * self.d, B)


def shared_rank(r: int, divide: int, least: int) -> int:
    """Return k: a part of r (the paper takes an eighth), and at least so many."""
    return max(least, r // divide)


def inject_rasa(
    model: nn.Module,
    names: list[str],
    r: int,
    k: int,
    alpha: float,
    first_A: Callable[[str, int, int], Tensor],
) -> nn.Module:
    """Freeze a model and put RaSA onto some of its linear layers, in place.

    Args:
        model: the plain model.
        names: paths of the layers; those whose last names agree share a pool.
        r: ranks of a layer, as LoRA's.
        k: ranks that each layer gives to its pool, at most r.
        alpha: LoRA's.
        first_A: gives A (r x in) of a layer by name, r and in; its last k rows go to the pool.
    """
    model.requires_grad_(False)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for members in kinds.values():
        layers = [model.get_submodule(name) for name in members]
        factors = [
            first_A(name, r, layer.in_features).to(layer.weight.device)
            for name, layer in zip(members, layers, strict=True)
        ]
        pool = RasaPool(torch.cat([A[r - k :] for A in factors]), layers[0].out_features)
        for name, layer, A in zip(members, layers, factors, strict=True):
            parent, _, attribute = name.rpartition(".")
            adapted = RasaLinear(layer, A[: r - k].clone(), pool, alpha)
            setattr(model.get_submodule(parent), attribute, adapted)
    return model
