"""Samples of the op `adapt`: what a layer of a chain passes to it, for every shortcut and place."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from reslora import _C
from reslora.nn import ops

# (res_mode, pre_num): every shortcut, with m below, at and beyond what a chain of 4 can reach.
SHORTCUTS = [
    ("none", 0),
    ("is", 1),
    ("bs", 1),
    ("bs", 2),
    ("bs", 7),
    ("bs", -1),
    ("ms", 1),
    ("ms", 2),
    ("ms", 7),
    ("ms", -1),
    ("ms", 0),
]
LENGTH = 4


def adapt(
    x,
    weight,
    bias,
    base_out,
    A,
    B,
    scaling,
    taps,
    dropout=0.0,
    bits=None,
    keep_tap=False,
    want_norms=False,
):
    """Evaluate one layer; returns y, s, tap, bits, norms."""
    member = ops.member(weight, bias, base_out, A, B, scaling, taps, keep_tap)
    return ops.adapt(x, [member], dropout=dropout, bits=bits, want_norms=want_norms)


def contiguous(shape, **kw):
    return torch.randn(*shape, **kw)


def transposed(shape, **kw):
    return torch.randn(*shape[:-2], shape[-1], shape[-2], **kw).transpose(-1, -2)


def sliced(shape, **kw):
    return torch.randn(*shape[:-1], 2 * shape[-1], **kw)[..., ::2]


def expanded(shape, **kw):
    return torch.randn(1, *shape[1:], **kw).expand(*shape)


def offset(shape, **kw):
    return torch.randn(shape[0] + 1, *shape[1:], **kw)[1:]


LAYOUTS = [contiguous, transposed, sliced, expanded, offset]


@dataclass
class Sample:
    """Tensors of one layer of a chain, and the arguments that its wiring makes of them."""

    chain: object
    position: int
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    A: list[torch.Tensor]
    B: list[torch.Tensor]
    taps: list[torch.Tensor]
    dropout: float = 0.0
    bits: torch.Tensor | None = None
    base_out: torch.Tensor | None = None

    @property
    def wiring(self):
        return self.chain.wiring(self.position)

    def differentiable(self):
        return [self.x, *self.taps, *self.A, *self.B]

    def call(self, *tensors):
        """Run adapt on tensors in the order of `differentiable`; returns all float outputs."""
        w = self.wiring
        x, rest = tensors[0], list(tensors[1:])
        taps, rest = rest[: len(self.taps)], rest[len(self.taps) :]
        A, B = rest[: len(w.a)], rest[len(w.a) :]
        weight = None if self.base_out is not None else self.weight
        bias = None if self.base_out is not None else self.bias
        y, s, tap = adapt(
            x,
            weight,
            bias,
            self.base_out,
            A,
            B,
            w.scaling,
            taps,
            self.dropout,
            self.bits,
            w.keep_tap,
        )[:3]
        return (y, s, tap) if tap.numel() or w.handed == "tap" else (y, s)


def make_chain(res_mode, pre_num, features=6, r=4, length=LENGTH, out_features=None, **options):
    config = {"r": r, "res_mode": res_mode, "pre_num": pre_num, **options}
    ranks = options.pop("ranks", None) or [r] * length
    config.pop("ranks", None)
    layers = [
        _C.LayerShape(f"layers.{n}", features, out_features or features, ranks[n], 0.5 + n)
        for n in range(length)
    ]
    return _C.Chain(json.dumps(config), layers)


def make_sample(
    res_mode,
    pre_num,
    position,
    *,
    r=4,
    leading=(3,),
    features=6,
    bias=True,
    dropout=0.0,
    layout=contiguous,
    dtype=torch.float64,
):
    chain = make_chain(res_mode, pre_num, features, r)
    w = chain.wiring(position)
    kw = {"dtype": dtype}
    tokens = int(torch.Size(leading).numel())
    x = layout((*leading, features), **kw).detach().requires_grad_()
    bits = None
    if dropout:
        bits = torch.randint(0, 256, (tokens, -(-features // 8)), dtype=torch.uint8)
    return Sample(
        chain=chain,
        position=position,
        x=x,
        weight=layout((features, features), **kw).detach(),
        bias=torch.randn(features, **kw) if bias else None,
        A=[layout((r, features), **kw).detach().requires_grad_() for _ in w.a],
        B=[layout((features, r), **kw).detach().requires_grad_() for _ in w.b],
        taps=[layout((*leading, r), **kw).detach().requires_grad_() for _ in w.taps],
        dropout=dropout,
        bits=bits,
    )


def unpack_bits(bits, features):
    return ((bits[:, :, None] >> torch.arange(8)) & 1).reshape(bits.shape[0], -1)[:, :features]
