"""What layers read in a forward, kept for checkpointing, which calls them again in the backward.

Non-reentrant checkpointing recomputes a region of the forward while the backward runs, without the
root. Each call of a layer leaves a `Recorded`, and the recompute asks for it in the same order:

- A `Region` hangs on the object that torch makes for every checkpointed region (its frame), which
  the forward and the recompute both reach through the hooks for saved tensors that are in force.
  It is exact: for layers that are called several times, and for several threads.
- A `Record` holds the calls of a whole forward. It serves where other hooks hide the frame: a
  checkpoint in a checkpoint, saved tensors that are moved to the CPU inside of a region. It is
  found by the sequence number of the autograd node at work, and hangs on the nodes of the layers.

Neither holds a graph, and both die with theirs.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor

NO_GRAPH_TASK = -1
Place = tuple[str, int]  # the key of a chain, and a position in it

# Private names of torch: without them a recompute cannot be told from a forward.
_graph_task_id: Any = getattr(torch._C, "_current_graph_task_id", None)
_current_node: Any = getattr(torch._C, "_current_autograd_node", None)
_next_sequence_nr: Any = getattr(torch.autograd, "_get_sequence_nr", None)
CAN_RECOMPUTE = None not in (_graph_task_id, _current_node, _next_sequence_nr)
# Without this one, every recompute is served by a `Record`.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

ATTRIBUTE = "_reslora_regions"  # of a frame: its regions, by session


def graph_task() -> int:
    """Return the id of the backward that this thread runs, -1 outside of one."""
    return _graph_task_id() if CAN_RECOMPUTE else NO_GRAPH_TASK


def is_recomputing() -> bool:
    """Tell whether a layer is called by a running backward (so it must record no statistic)."""
    return not torch.compiler.is_compiling() and graph_task() != NO_GRAPH_TASK


class Recorded:
    """What one call of a layer read, without its graph."""

    def __init__(self) -> None:
        self.taps: list[Tensor | None] = []
        self.together: tuple[str, ...] = ()  # the layers that were evaluated by this call

    def keep(self, taps: list[Tensor | None]) -> None:
        """Keep the taps that the call found, those left out as None."""
        self.taps = [
            None if tap is None else tap.detach().requires_grad_(tap.requires_grad) for tap in taps
        ]


class Region:
    """The calls of one checkpointed region, in order."""

    def __init__(self) -> None:
        self.calls: dict[Place, list[Recorded]] = {}
        self.backward: object = None
        self.served: dict[Place, int] = {}

    def add(self, place: Place, recorded: Recorded) -> None:
        """Note the next call of the layer at `place`."""
        self.calls.setdefault(place, []).append(recorded)

    def enter(self, backward: object) -> Region:
        """Begin a recompute: a region is recomputed once in each backward."""
        if self.backward != backward:
            self.backward, self.served = backward, {}
        return self

    def is_unclear(self, place: Place) -> bool:
        """Tell whether a call of the layer at `place` cannot be told from another: never."""
        return False

    def upcoming(self, place: Place) -> Recorded | None:
        """Return what the next call of the layer at `place` read in the forward."""
        calls, number = self.calls.get(place, []), self.served.get(place, 0)
        return calls[number] if number < len(calls) else None

    def advance(self, place: Place) -> None:
        """Pass over the next call of the layer at `place`."""
        self.served[place] = self.served.get(place, 0) + 1


class Record:
    """The calls of one forward."""

    def __init__(self, thread: object) -> None:
        self.thread = thread
        # A forward inside of a region begins anew where the region is recomputed: its calls are not
        # the region's. (A graph holds the record, and the frame holds tensors of the graph.)
        around, _ = _frame("frame")
        self.around = None if around is None else weakref.ref(around)
        self.begin: int = _next_sequence_nr()
        self.end: int | None = None
        self.calls: dict[Place, list[Recorded]] = {}

    def close(self) -> None:
        """Note that the forward ended: later nodes are not its own."""
        self.end = _next_sequence_nr()

    def covers(self, sequence_nr: int) -> bool:
        """Tell whether the autograd node with this number was made by this forward."""
        return self.begin <= sequence_nr and (self.end is None or sequence_nr < self.end)

    def add(self, session: object, place: Place) -> Recorded:
        """Return the record of a new call, noted here and in the region that it is part of."""
        recorded = Recorded()
        self.calls.setdefault(place, []).append(recorded)
        frame, _ = _frame("frame")
        if frame is not None and (self.around is None or frame is not self.around()):
            regions = frame.__dict__.setdefault(ATTRIBUTE, {})
            if session not in regions:
                regions[session] = Region()
            regions[session].add(place, recorded)
        return recorded

    def is_unclear(self, place: Place) -> bool:
        """Tell whether the layer was called several times, so that a call cannot be told."""
        return len(self.calls.get(place, [])) > 1

    def upcoming(self, place: Place) -> Recorded | None:
        """Return what the layer at `place` read."""
        calls = self.calls.get(place)
        return calls[0] if calls else None

    def advance(self, place: Place) -> None:
        """Do nothing: the one call of a layer serves every recompute."""


def region_of_recompute(session: object) -> Region | None:
    """Return the region that is being recomputed; None where that cannot be seen from here."""
    frame, gid = _frame("target_frame_ref")
    if frame is None:
        return None
    region = frame.__dict__.get(ATTRIBUTE, {}).get(session)
    return (Region() if region is None else region).enter(gid)


def records_of_recompute(records: list[Record]) -> list[Record]:
    """Return the records of the forwards that may have made the node at work, oldest first."""
    number = _current_node()._sequence_nr()
    return sorted((r for r in records if r.covers(number)), key=lambda record: record.begin)


def _frame(variable: str) -> tuple[Any, object]:
    """Return torch's object for the checkpointed region around this call, and of which backward.

    The hooks of checkpointing close over it: in a forward as `frame`, in a recompute weakly as
    `target_frame_ref`.
    """
    hooks = None if _top_hooks is None else _top_hooks(True)
    if hooks is None:
        return None, None
    pack = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
        return None, None
    names = pack.__code__.co_freevars
    cells = dict(zip(names, pack.__closure__ or (), strict=True))
    if variable not in cells:
        return None, None
    frame = cells[variable].cell_contents
    if variable == "frame":
        return frame, None
    return frame(), cells["gid"].cell_contents if "gid" in cells else graph_task()
