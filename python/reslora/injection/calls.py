"""What keeps adapted layers called: fused paths are left, and the first training step is looked at.

An adapter works only where its layer is called. torch's encoder reads weights in a fused kernel in
eval mode, unless a module of it has a hook: it gets one. What else is never called, because some
kernel or a parent's own code reads the weight, gets no gradient: the first training step shows it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._C import is_in_experts
from .adapted import Injection

PATIENCE = 8  # training steps: single layers of a chain may be skipped now and then (LayerDrop)


def leave_fused_paths(model: nn.Module, injection: Injection) -> None:
    """Let torch's encoders call the adapted layers in eval mode too, until the passes close."""
    parents = {id(parent) for parent, _, _ in injection.places}
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        if not any(id(module) in parents for module in encoder.modules()):
            continue
        if isinstance(encoder, nn.TransformerEncoderLayer):
            injection.hooks.append(encoder.register_forward_hook(_leave_fused_path))
        else:  # only the fused path takes nested tensors
            injection.nested.append((encoder, getattr(encoder, "use_nested_tensor", False)))
            encoder.use_nested_tensor = False


def _leave_fused_path(layer: nn.Module, args: Any, output: Any) -> None:
    """Do nothing: with a hook, torch evaluates the layer by its modules."""


@dataclass
class _Watch:
    """The layers that have had no gradient yet, by name, and how many steps have passed."""

    silent: set[str]
    steps: int = 0

    def look(self, injection: Injection, held: set[int], moved: set[int]) -> list[str]:
        """Return the layers to report after a step; whole chains by their names.

        `held` are the ids of the optimizer's parameters, `moved` of those that have a gradient.
        """
        # An A alone tells nothing: another layer may have read it.
        pairs = {
            x.name: held & {id(x.reslora_A), id(x.reslora_B)}
            for x in injection.layers
            if id(x.reslora_B) in held
        }
        if not pairs or not moved:
            return []  # the optimizer of another model, or no training step
        self.steps += 1
        self.silent -= {name for name, own in pairs.items() if own <= moved}
        found = []
        for chain in injection.chains:
            names = [name for name in chain.names if name in self.silent & pairs.keys()]
            # A step may need none of some experts.
            is_whole = names == chain.names and not is_in_experts(names[0])
            if names and (is_whole or self.steps >= PATIENCE):
                found += [f"{chain.key} ({len(names)} layers)"] if is_whole else names
                self.silent -= set(names)
        return found


_watched: WeakKeyDictionary[Injection, _Watch] = WeakKeyDictionary()
_hooks: list[Any] = []  # on the steps of all optimizers: one, made with the first injection


def watch_first_step(injection: Injection) -> None:
    """Warn after the first training step of layers that it gave no gradient."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _watched[injection] = _Watch({layer.name for layer in injection.layers})


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _watched:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held, moved = set(map(id, parameters)), {id(p) for p in parameters if p.grad is not None}
    for injection, watch in list(_watched.items()):
        names = watch.look(injection, held, moved)
        if not watch.silent or watch.steps >= PATIENCE:
            _watched.pop(injection, None)
        if names:
            steps = "the first step" if watch.steps == 1 else f"{watch.steps} steps"
            warnings.warn(
                f"[inject] adapted layers must be called; got no gradient in {steps} for "
                f"{', '.join(names)}: a kernel or the code around them reads the weights without "
                "a call, or the loss does not need them (name them in exclude_modules)",
                stacklevel=3,
            )
