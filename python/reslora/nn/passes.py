"""Passes: the calls and taps of one forward.

A pass is a plain object, never a module, so no state_dict knows it. Passes belong to a thread and
nest: a model may be called inside its own forward.

A layer may be called several times in a pass. Its k-th call reads the taps of the k-th calls of the
layers that it is wired to. Where layers turn out to be called unequally often, it is unknown which
of their calls see the same tokens: their link is left out from then on, with a warning.
"""

from __future__ import annotations

import warnings
from types import FrameType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..config import ResLoraConfig
from .recompute import Place, Record, Recorded


class Wiring(NamedTuple):
    """What one layer reads and hands on; integers are positions in its chain."""

    a: list[int]
    b: list[int]
    scaling: list[float]
    taps: list[int]
    handed: str  # "nothing", "tap" or "s"
    keep_tap: bool


class _Chain(Protocol):
    """What a session reads of a `LayerChain`."""

    key: str
    config: ResLoraConfig
    names: list[str]


class Linked(Protocol):
    """What a session reads of an adapted layer."""

    name: str
    position: int
    wiring: Wiring
    training: bool
    left_out: dict[int, str]

    @property
    def chain(self) -> _Chain:
        """The chain that the layer belongs to."""

    @property
    def reslora_A(self) -> Tensor:  # noqa: N802
        """A [r, in]."""

    def count_link(self, reason: str | None) -> None:
        """Note that a tap was used, or why not."""


class Waiting(Protocol):
    """Results that were computed ahead for layers that are called later."""

    def drop(self) -> None:
        """Note that nobody took them: these layers are not computed ahead again."""


class ForwardPass:
    """The calls and taps of one forward, by chain and position."""

    def __init__(
        self, task: int, is_grad_enabled: bool, record: Record | None, frame: FrameType | None
    ) -> None:
        self.task = task
        self.is_grad_enabled = is_grad_enabled
        self.record = record
        self.frame = frame  # of the call of the root; None in a compiled forward
        self.ahead: list[Waiting] = []  # what a group of layers computed ahead: one or none
        self.calls: dict[Place, int] = {}
        self.taps: dict[tuple[str, int, int], Tensor] = {}  # the last number is that of the call
        self.readers: dict[Place, Linked] = {}
        self.is_repeating = False
        # Links of which a tap was read when later calls of the layer before had been made.
        self.behind: set[tuple[str, int, int]] = set()

    def enter(self, place: Place) -> int:
        """Return the number of a new call of the layer at `place`."""
        number = self.calls.get(place, 0)
        self.calls[place] = number + 1
        if number:
            self.is_repeating = True
        return number

    def taps_of(self, layer: Linked, number: int) -> list[Tensor | None]:
        """Return what the layers that `layer` reads handed on in their calls of this number."""
        key = layer.chain.key
        return [
            None if j in layer.left_out else self.taps.get((key, j, number))
            for j in layer.wiring.taps
        ]

    def note_read(self, layer: Linked, number: int) -> None:
        """Remember that `layer` has read its taps, for `unequal`."""
        key, n = layer.chain.key, layer.position
        self.readers[key, n] = layer
        for j in layer.wiring.taps:
            if self.calls.get((key, j), 0) > number + 1:
                self.behind.add((key, n, j))

    def unequal(self) -> list[tuple[Linked, int, int, int]]:
        """Return (layer, j, its calls, calls of j) for links whose calls cannot be paired.

        A loop over the layers that is left early is no such case: there each call has read what
        the layer before handed on last.
        """
        found = []
        for (key, n), layer in self.readers.items():
            own = self.calls[key, n]
            for j in layer.wiring.taps:
                other = self.calls.get((key, j), 0)
                is_in_step = own < other and (key, n, j) not in self.behind
                if other not in (0, own) and not is_in_step and j not in layer.left_out:
                    found.append((layer, j, own, other))
        return found


class Call:
    """One call of a layer: its pass, its number in it, and what stays for or from a recompute."""

    def __init__(
        self, current: ForwardPass | None, number: int, recorded: Recorded | None, slot: list[Any]
    ) -> None:
        self.current = current
        self.number = number
        self.recorded = recorded
        self.slot = slot  # of results that were computed ahead


def drop_interrupted(passes: list[ForwardPass], frame: FrameType | None) -> None:
    """Drop passes of calls that `frame` is not part of: an interrupt is the exit without a hook."""
    running = set()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    passes[:] = [p for p in passes if p.frame is None or p.frame in running]


def is_running(frame: FrameType) -> bool:
    """Tell whether a call goes on. The variables of one that was interrupted are let go."""
    try:
        frame.clear()
    except RuntimeError:  # it cannot be cleared while it is executed
        return True
    return False


def leave_out(closed: ForwardPass, is_compiling: bool) -> None:
    """Leave links out from now on whose calls could not be paired in a pass."""
    for layer, j, own, other in closed.unequal():
        name = layer.chain.names[j]
        reason = f"it ran {own} and {name} {other} times in one forward"
        layer.left_out[j] = reason
        if layer.chain.config.strict_links:
            layer.count_link(reason)  # raises
        if not is_compiling:
            warnings.warn(
                f"[session] {layer.name} runs without the shortcut from {name} from now on: "
                f"{reason}, so it is unknown which of their calls see the same tokens",
                stacklevel=4,
            )
