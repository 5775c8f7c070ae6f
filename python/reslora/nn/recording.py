"""What training forwards leave in a layer for the merge rules: norms, and sums of products.

All of it stays on the device. A statistic changes no output and no weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._C import PRODUCTS_DECAY, PRODUCTS_EVERY
from . import ops

Layer = Any  # a ResLoraLinear, which lies above


def make_windows(layer: Layer, device: torch.device) -> None:
    """Make an empty ring of norms and, where the layer is linked, sums that are zero."""
    size = layer.chain.config.norm_window
    layer.norms = torch.zeros(2, size, dtype=torch.float32, device=device)
    layer.norm_count = torch.zeros(1, dtype=torch.int64, device=device)
    if layer.wiring.taps:
        make_products(layer, device)


def make_products(layer: Layer, device: torch.device) -> None:
    """Make sums of products that are zero."""
    layer.products = torch.zeros(2 * layer.r, 2 * layer.r, dtype=torch.float32, device=device)


def record_norms(layer: Layer, x: Tensor, norms: Tensor) -> None:
    """Write a forward's norms into the ring."""
    if layer.norms is None or layer.norm_count is None:
        make_windows(layer, x.device)
    elif layer.norms.device != x.device:
        layer.norms, layer.norm_count = layer.norms.to(x.device), layer.norm_count.to(x.device)
    ring, count = layer.norms, layer.norm_count
    if torch.compiler.is_compiling():
        # A checkpoint that is compiled for no kernels (backend "eager") keeps what goes into its
        # region, and demands that nobody writes there: `data` has a version of its own.
        ring, count = ring.data, count.data
    ops.record_norms(norms, ring, count)


def record_products(layer: Layer, s: Tensor, taps: list[Tensor]) -> None:
    """Add a forward's products to the sums: of every eighth, or of all where they are compiled.

    A layer that merges exactly reads no taps; a forward that misses one is not what is merged.
    """
    if not taps or len(taps) != len(layer.wiring.taps) - len(layer.left_out):
        return
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling:
        layer.forwards += 1
        if (layer.forwards - 1) % PRODUCTS_EVERY:
            return
    if layer.products is None:
        make_products(layer, s.device)
    elif layer.products.device != s.device:
        layer.products = layer.products.to(s.device)
    products: Tensor = layer.products
    ops.record_products(s, taps, products.data if is_compiling else products, PRODUCTS_DECAY)
