"""Layers that are stood in for: a model runs as if merged, and is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..nn import ops
from ..nn.layer import ResLoraLinear

Planned = list[tuple[ResLoraLinear, Any]]  # with an entry of a plan


@contextmanager
def standing_in(
    planned: Planned, make: Callable[[ResLoraLinear, Any], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Let every layer be stood in for by what `make` makes of its plan."""
    try:
        for layer, entry in planned:
            layer.stand_in = make(layer, entry)
        yield
    finally:
        for layer, _ in planned:
            layer.stand_in = None


def planned_pair(layer: ResLoraLinear, planned: Any) -> Callable[[Tensor], Tensor]:
    """Return the layer as its base beside the pair that a plan has for it."""
    return plain_lora(layer, planned.A, planned.B, 1.0, planned.bias)


def plain_lora(
    layer: ResLoraLinear, A: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the layer as the plain LoRA W x + scaling B A x, without shortcut."""

    def run(x: Tensor) -> Tensor:
        y = ops.adapt(x, [ops.member(*layer.evaluate_base(x), [A], [B], [scaling])])[0]
        return y if bias is None else y + bias.to(y.dtype)

    return run
