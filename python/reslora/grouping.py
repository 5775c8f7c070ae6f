"""Layers that read the same x, evaluated by one op: q, k and v; gate and up.

They share the down-projection, its dropout mask and the accumulation into dx. Candidates are found
by name when a model is adapted. The model goes on calling them one after the other: the first call
computes the others' results ahead, and each of them takes its own where it is called with the very
same tensor. A layer that is called with another one leaves its group for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .session import NO_GRAPH_TASK, graph_task, next_sequence_nr

if TYPE_CHECKING:
    from .layer import ResLoraLinear
    from .session import ForwardPass, Session

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

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # y, s, tap, norms


class Ahead(NamedTuple):
    """Results that wait for their layers, of one group."""

    group: Group
    x: Tensor
    version: int
    state: tuple[int, bool]  # graph task, gradients enabled
    results: dict[str, Outputs]


class Group:
    """Layers of one parent that may be evaluated together; the first to be called computes."""

    def __init__(self, layers: list[ResLoraLinear], session: Session) -> None:
        self.layers = layers
        self.session = session
        # When a layer left: the sequence number of autograd then (a recompute may be of before).
        self.left: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The layers that are evaluated together still."""
        return [layer.name for layer in self.layers if layer.name not in self.left]

    def outputs(
        self, layer: ResLoraLinear, x: Tensor, current: ForwardPass | None
    ) -> Outputs | None:
        """Return what `layer` makes of x, None where it is to compute that alone."""
        is_compiling = torch.compiler.is_compiling()
        grad = torch.is_grad_enabled()
        if is_compiling and not grad:
            return None  # a traced tensor has no version, and no backward would see a change of x
        task = NO_GRAPH_TASK if is_compiling else graph_task()
        if current is None and task == NO_GRAPH_TASK:
            return None  # nobody would clear what is left over
        version = 0 if is_compiling or x.is_inference() else x._version
        slot = self.session.open.ahead
        if slot and slot[0].group is self and layer.name in slot[0].results:
            ahead = slot[0]
            result = ahead.results.pop(layer.name)
            is_same = ahead.x is x and ahead.version == version
            if not is_same or not ahead.results:
                slot.clear()
            if is_same and ahead.state == (task, grad):
                return result
            if ahead.x is not x:
                self.left[layer.name] = 0 if is_compiling else next_sequence_nr()
            return None
        members = self._members(layer, task)
        results = _evaluate(members, x, self.session, current) if members else None
        if results is None:
            return None
        slot.clear()
        slot.append(Ahead(self, x, version, (task, grad), results))
        return results.pop(layer.name)

    def _members(self, layer: ResLoraLinear, task: int) -> list[ResLoraLinear]:
        """Return the layers to evaluate together, [] where `layer` is not the first of them."""
        members = self.layers
        if self.left:
            begin = None if task == NO_GRAPH_TASK else self.session.begin_of_recompute()
            members = [
                m
                for m in members
                if m.name not in self.left or (begin is not None and begin < self.left[m.name])
            ]
        return members if len(members) > 1 and members[0] is layer else []


def _evaluate(
    layers: list[ResLoraLinear], x: Tensor, session: Session, current: ForwardPass | None
) -> dict[str, Outputs] | None:
    """Return every layer's results by name, None where they cannot be evaluated together."""
    first, like = layers[0], layers[0].weight
    members = []
    for layer in layers:
        base = layer.plain_base()
        if base is None or layer.training != first.training or not layer.is_active():
            return None
        if base[0].dtype != like.dtype or base[0].device != like.device:
            return None
        members.append(layer.member(x, *base, None, session.peek(layer, x, current)))
    wants_norms = any(layer.wants_norms(x) for layer in layers)
    out = first.adapt(x, members, wants_norms)
    results = {}
    for g, layer in enumerate(layers):
        norms = out[-1].narrow(0, 2 * g, 2) if wants_norms else out[-1]
        results[layer.name] = (out[3 * g], out[3 * g + 1], out[3 * g + 2], norms)
    return results


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
