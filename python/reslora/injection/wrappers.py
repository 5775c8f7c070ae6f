"""What torch wraps layers in, where their taps would be lost: known before the first backward.

A recompute finds the taps of a forward by the checkpoint around it (nn/recompute.py), and a
compiled forward leaves nothing there. A checkpoint inside of what is compiled works.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ..nn.layer import ResLoraLinear

_looked_at: WeakSet[nn.Module] = WeakSet()  # roots


def refuse_compiled_in_checkpoints(root: nn.Module, args: Any) -> None:
    """Refuse compiled blocks inside of checkpoints (forward pre-hook of the root of chains).

    Looks once, in the first training forward: layers may be wrapped after they were adapted.

    Raises:
        RuntimeError: where layers that read taps lie in such a block.
    """
    if torch.compiler.is_compiling() or not (root.training and torch.is_grad_enabled()):
        return
    if root in _looked_at:
        return
    for block in _compiled_in_checkpoints(root, is_inside=False):
        for layer in block.modules():
            if isinstance(layer, ResLoraLinear) and layer.wiring.taps and layer.is_in_use:
                raise RuntimeError(
                    "[session] a block with a shortcut must not be compiled inside of a "
                    "checkpoint, whose recompute finds no tap there; got that of "
                    f"{layer.name} (compile outside: torch.compile(checkpoint_wrapper(block)), "
                    "torch.compile(block) where the block checkpoints itself, or the whole model)"
                )
    _looked_at.add(root)


def _compiled_in_checkpoints(module: nn.Module, is_inside: bool) -> Iterator[nn.Module]:
    """Yield the compiled modules at and below `module` that a checkpoint calls."""
    is_inside = is_inside or _checkpoints_itself(module)
    if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
        if is_inside:
            yield module
        return  # what lies below is compiled with it
    is_inside = is_inside or "_checkpoint_wrapped_module" in module._modules
    for child in module.children():
        yield from _compiled_in_checkpoints(child, is_inside)


def _checkpoints_itself(module: nn.Module) -> bool:
    """Tell whether a layer of transformers checkpoints what calling it does."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return "GradientCheckpointingLayer" in kinds and bool(module.gradient_checkpointing)
