"""Layers that read the same x, evaluated by one op: q, k and v; gate and up.

They share the down-projection, its dropout mask and the accumulation into dx. Candidates are found
by name when a model is adapted. The model goes on calling them one after the other: the first call
computes the others' results ahead, and each of them takes its own where it is called with the very
same tensor. A layer that is called with another one leaves its group for good.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layer import Base, Outputs, ResLoraLinear, Together
from .passes import Call
from .recompute import NO_GRAPH_TASK, graph_task
from .session import Session

# Names of projections that read one tensor, in transformers and diffusers.
NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


class Ahead(NamedTuple):
    """Results that wait for their layers, of one group."""

    group: Group
    x: Tensor
    state: tuple[Any, ...]  # what must be the same when a layer takes its result
    results: dict[str, Outputs]
    taps: dict[str, list[Tensor]]  # what was added to each layer's product

    def drop(self) -> None:
        """Note that nobody took the results: these layers are not computed ahead again."""
        self.group.left.update(self.results)


class Group(Together):
    """Layers of one parent that may be evaluated together; the first that is called computes."""

    def __init__(self, layers: list[ResLoraLinear], session: Session) -> None:
        self.layers = layers
        self.session = session
        self.left: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The layers that are evaluated together still."""
        return [layer.name for layer in self.layers if layer.name not in self.left]

    def outputs(
        self, layer: ResLoraLinear, x: Tensor, taps: list[Tensor], call: Call | None
    ) -> Outputs:
        """Return what `layer` makes of x and its taps, computed with the others where it can be."""
        found = None if call is None else self._shared(layer, x, taps, call)
        return super().outputs(layer, x, taps, call) if found is None else found

    def _shared(
        self, layer: ResLoraLinear, x: Tensor, taps: list[Tensor], call: Call
    ) -> Outputs | None:
        """Return what was, or now is, computed together; None where `layer` is to do it alone."""
        task = _task_of(layer, x, call)
        if task is None:
            return None
        slot = call.slot  # of Ahead
        state = _state_of(x, task)
        if slot and slot[0].group is self and layer.name in slot[0].results:
            ahead = slot[0]
            if ahead.x is x:
                result, used = ahead.results.pop(layer.name), ahead.taps[layer.name]
                if not ahead.results:
                    slot.clear()
                is_same = ahead.state == state and len(used) == len(taps)
                return result if is_same and all(map(operator.is_, used, taps)) else None
            if task == NO_GRAPH_TASK:
                self._split(set(ahead.results))
            slot.clear()
        self.session.drop_ahead(slot, is_finished=task == NO_GRAPH_TASK)
        layers = self._together(layer, call, task)
        results = _evaluate(layers, layer, x, taps, call) if layers else None
        if results is None:
            return None
        outputs, read = results
        slot.append(Ahead(self, x, state, outputs, read))
        if task != NO_GRAPH_TASK:  # a recompute may end before every layer was called
            torch.autograd.Variable._execution_engine.queue_callback(slot.clear)
        return outputs.pop(layer.name)

    def _split(self, waiting: set[str]) -> None:
        """Part layers that read one x from those that read another: the larger part stays."""
        served = set(self.names) - waiting
        self.left |= served if len(waiting) > len(served) else waiting

    def _together(self, layer: ResLoraLinear, call: Call, task: int) -> list[ResLoraLinear]:
        """Return the layers to evaluate with `layer`; a recompute does as its forward did."""
        recorded = call.recorded
        if task != NO_GRAPH_TASK and call.current is None:
            names = () if recorded is None else recorded.together
        else:
            names = tuple(self.names) if layer.name not in self.left else ()
        layers = [other for other in self.layers if other.name in names]
        if len(layers) < 2 or not any(other is layer for other in layers):
            return []
        if recorded is not None:
            recorded.together = names
        return layers


def _task_of(layer: ResLoraLinear, x: Tensor, call: Call) -> int | None:
    """Return the graph task; None where results must not be kept for later."""
    if torch.compiler.is_compiling():
        # A traced tensor has no version; the backward notices a change of x if it reads x.
        reads_x = layer.training and torch.is_grad_enabled() and layer.reslora_A.requires_grad
        return NO_GRAPH_TASK if reads_x and call.current is not None else None
    task = graph_task()
    if x.is_inference() or (call.current is None and task == NO_GRAPH_TASK):
        return None  # no version either; nobody would clear what is left over
    return task


def _state_of(x: Tensor, task: int) -> tuple[Any, ...]:
    """Return what the result of an op on x depends on, beside x and the parameters."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if torch.compiler.is_compiling():
        return task, autocast, x.requires_grad
    return (
        task,
        autocast,
        x.requires_grad,
        x._version,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def _evaluate(
    layers: list[ResLoraLinear], first: ResLoraLinear, x: Tensor, own: list[Tensor], call: Call
) -> tuple[dict[str, Outputs], dict[str, list[Tensor]]] | None:
    """Return every layer's results and taps by name, None where it cannot be done together.

    `first` is the layer that is being called, `own` are its taps.
    """
    like: tuple[torch.dtype, torch.device] | None = None
    bases: list[Base] = []
    for layer in layers:
        base = layer.plain_base()
        if base is None or not layer.is_active() or not _is_alike(layer, first):
            return None
        kind = (base[0].dtype, base[0].device)
        like = kind if like is None else like
        if kind != like:
            return None
        bases.append((*base, None))
    session = first.chain.session
    assert session is not None  # a group has one
    taps = [own if layer is first else session.peek(layer, x, call.current) for layer in layers]
    names = [layer.name for layer in layers]
    results = first.evaluate(layers, bases, taps, x)
    return dict(zip(names, results, strict=True)), dict(zip(names, taps, strict=True))


def _is_alike(layer: ResLoraLinear, first: ResLoraLinear) -> bool:
    """Tell whether a layer drops out as the first, and whether nothing runs before it is called."""
    is_same = layer.training == first.training and layer.lora_dropout == first.lora_dropout
    return is_same and (layer is first or not layer._forward_pre_hooks)


def find_groups(layers: list[ResLoraLinear]) -> list[list[ResLoraLinear]]:
    """Return layers that may be evaluated together: siblings by name, with equal in_features."""
    siblings: dict[str, dict[str, ResLoraLinear]] = {}
    for layer in layers:
        parent, _, own = layer.name.rpartition(".")
        siblings.setdefault(parent, {})[own] = layer
    groups = []
    for found in siblings.values():
        for names in NAMES:
            group = [found[name] for name in names if name in found]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1:
                groups.append(group)
    return groups
