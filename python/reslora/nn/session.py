"""What passes between the layers of a chain while a model runs.

A *pass* is one forward of the chain's root module: a fresh store of taps, opened by a pre-hook of
the root and closed by a hook that also runs after an exception. It is a plain object, never a
module, so no state_dict knows it. A tap that is missing or of another shape is left out: that layer
runs plain, and it is counted.

Recompute (non-reentrant checkpointing) calls layers again while the backward runs, without the
root. It is recognised by the id of the running graph task, and finds what each layer read the first
time through the sequence number of the autograd node at work, in a *record* that hangs on the
adapted nodes and dies with their graph. Where none is found it is an error, never a plain layer.

Example (what `inject` does)::

    session = Session("model")
    session.attach(model.model)  # hooks; session.detach() removes them
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import ResLoraConfig

NOT_CALLED = "the root was not called"
NO_GRAPH_TASK = -1

# Private names of torch: without them a recompute cannot be told from a forward.
_graph_task_id: Any = getattr(torch._C, "_current_graph_task_id", None)
_current_node: Any = getattr(torch._C, "_current_autograd_node", None)
_next_sequence_nr: Any = getattr(torch.autograd, "_get_sequence_nr", None)
CAN_RECOMPUTE = None not in (_graph_task_id, _current_node, _next_sequence_nr)


def graph_task() -> int:
    """Return the id of the backward that this thread runs, -1 outside of one."""
    return _graph_task_id() if CAN_RECOMPUTE else NO_GRAPH_TASK


def is_recomputing() -> bool:
    """Tell whether a layer is called by a running backward (so it must record no statistic)."""
    return not torch.compiler.is_compiling() and graph_task() != NO_GRAPH_TASK


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


class Record:
    """What the layers of one forward read, for a later recompute. Holds no graph."""

    def __init__(self, thread: object) -> None:
        self.thread = thread
        self.begin: int = _next_sequence_nr()
        self.end: int | None = None
        self.reads: dict[tuple[str, int], list[Tensor | None]] = {}
        self.repeated: set[tuple[str, int]] = set()
        # By the layer that was called first: the layers that were evaluated with it.
        self.together: dict[str, tuple[str, ...]] = {}

    def covers(self, sequence_nr: int) -> bool:
        """Tell whether the autograd node with this number was made by this forward."""
        return self.begin <= sequence_nr and (self.end is None or sequence_nr < self.end)

    def add(self, place: tuple[str, int], taps: list[Tensor | None]) -> None:
        """Keep what the layer at `place` read, without its graph."""
        if place in self.reads:
            self.repeated.add(place)
        self.reads[place] = [
            None if tap is None else tap.detach().requires_grad_(tap.requires_grad) for tap in taps
        ]


def _newest(records: list[Record]) -> Record | None:
    return max(records, key=lambda record: record.begin, default=None)


class ForwardPass:
    """The taps of one forward, by chain and position."""

    def __init__(self, task: int, is_grad_enabled: bool, record: Record | None) -> None:
        self.task = task
        self.is_grad_enabled = is_grad_enabled
        self.record = record
        self.taps: dict[tuple[str, int], Tensor] = {}

    def taps_of(self, layer: Linked) -> list[Tensor | None]:
        """Return what the layers that `layer` reads have handed on so far."""
        key = layer.chain.key
        return [self.taps.get((key, j)) for j in layer.wiring.taps]


class _PerThread(threading.local):
    """The open passes of a thread: at most one for each graph task."""

    def __init__(self) -> None:
        self.thread = object()  # threading.get_ident() may name a later thread too
        self.passes: list[ForwardPass] = []
        self.ahead: list[Waiting] = []  # what a group of layers computed ahead: one or none


class Session:
    """Opens and closes the passes of one root module and serves the taps of its chains."""

    def __init__(self, root_name: str) -> None:
        self.root_name = root_name
        self.handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.open = _PerThread()
        self.records: list[weakref.ref[Record]] = []
        self.has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave passes and records out: copies and files start between two forwards."""
        return {"root_name": self.root_name, "handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def attach(self, root: nn.Module) -> None:
        """Open a pass at every call of `root` and close it when the call ends, however it ends."""
        global _read_outside_of_compile
        if _read_outside_of_compile is _read_outside:
            _read_outside_of_compile = torch.compiler.disable(_read_outside, reason=WHY_OUTSIDE)
        self.handles = [
            root.register_forward_pre_hook(self.begin, prepend=True, with_kwargs=True),
            root.register_forward_hook(self.finish, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def begin(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Open a fresh pass (forward pre-hook of the root)."""
        is_grad_enabled = torch.is_grad_enabled()
        passes = self.open.passes  # changed in place: torch.compile traces no attribute of a thread
        self.open.ahead.clear()
        if torch.compiler.is_compiling():
            passes.clear()
            passes.append(ForwardPass(NO_GRAPH_TASK, is_grad_enabled, None))
            return
        task = graph_task()
        record = None
        if is_grad_enabled and CAN_RECOMPUTE:
            record = Record(self.open.thread)
            self.records = [ref for ref in self.records if ref() is not None]
            self.records.append(weakref.ref(record))
        # A pass of the same task is a leftover: an interrupt is the one exit that runs no hook.
        passes[:] = [p for p in passes if p.task != task]
        passes.append(ForwardPass(task, is_grad_enabled, record))

    def finish(self, root: nn.Module, args: Any, output: Any) -> None:
        """Close the newest pass (forward hook of the root, also called after an exception)."""
        self.drop_ahead(is_finished=output is not None)  # None: an exception was raised
        passes = self.open.passes
        if not passes:
            return
        record = passes.pop().record
        if record is not None:
            record.end = _next_sequence_nr()

    def drop_ahead(self, is_finished: bool) -> None:
        """Forget what was computed ahead; in a forward that is finished nobody will take it."""
        ahead = self.open.ahead
        if ahead and is_finished:
            ahead[0].drop()
        ahead.clear()

    def current(self, is_compiling: bool) -> ForwardPass | None:
        """Return the pass that this thread has open for the running graph task, if any."""
        passes = self.open.passes
        if not passes:
            return None
        newest = passes[-1]
        return newest if is_compiling or newest.task == graph_task() else None

    def read(self, layer: Linked, x: Tensor, current: ForwardPass | None) -> list[Tensor]:
        """Return the taps that `layer` adds: those it is wired to that fit x [..., in]."""
        is_compiling = torch.compiler.is_compiling()
        if current is None:
            read_outside = _read_outside_of_compile if is_compiling else Session._read_outside
            found = read_outside(self, layer)
            return [] if found is None else self._fitting(layer, found, x, False)
        if not torch.is_grad_enabled():
            self._refuse_reentrant(layer, current)
        found = current.taps_of(layer)
        taps = self._fitting(layer, found, x, is_compiling or current.task == NO_GRAPH_TASK)
        if current.record is not None and not is_compiling:
            current.record.add((layer.chain.key, layer.position), found)
        return taps

    def peek(self, layer: Linked, x: Tensor, current: ForwardPass | None) -> list[Tensor]:
        """Return what `read` will, without a trace of it."""
        if not layer.wiring.taps:
            return []
        if current is not None:
            return self._fitting(layer, current.taps_of(layer), x, False)
        record = _newest(self._records_of_recompute())
        place = (layer.chain.key, layer.position)
        reads = None if record is None else record.reads.get(place)
        return [] if reads is None else self._fitting(layer, reads, x, False)

    def write(self, layer: Linked, tap: Tensor, y: Tensor, current: ForwardPass) -> None:
        """Keep what `layer` hands on for the rest of the pass; the record lives as long as y."""
        if layer.wiring.handed != "nothing":
            current.taps[(layer.chain.key, layer.position)] = (
                tap.detach() if layer.chain.config.detach_taps else tap
            )
        if current.record is None or torch.compiler.is_compiling() or y.grad_fn is None:
            return
        node: Any = y.grad_fn
        node.metadata["reslora"] = current.record

    def _fitting(
        self, layer: Linked, found: list[Tensor | None], x: Tensor, is_forward: bool
    ) -> list[Tensor]:
        taps, rows = [], x.shape[:-1]
        for j, tap in zip(layer.wiring.taps, found, strict=True):
            reason = None
            if tap is None:
                reason = f"{layer.chain.names[j]} did not run before it"
            elif tap.shape[:-1] != rows:
                reason = f"{layer.chain.names[j]} ran on another number of tokens"
            else:
                taps.append(tap)
            if is_forward:
                layer.count_link(reason)
        return taps

    def _read_outside(self, layer: Linked) -> list[Tensor | None] | None:
        """Serve a layer that was called while no pass is open here."""
        if graph_task() != NO_GRAPH_TASK:
            return self._recorded(layer)
        if not CAN_RECOMPUTE and layer.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"[session] {layer.name} must run inside a call of {self.root_name or 'the model'} "
                "(this torch has no way to find it in a recompute: train without checkpointing)"
            )
        for _ in layer.wiring.taps:
            layer.count_link(NOT_CALLED)
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"[session] {layer.name} ran without its shortcut: {self.root_name or 'the model'} "
                f"was not called; call it as module(...), not through its forward or its parts",
                stacklevel=3,
            )
        return None

    def _records_of_recompute(self) -> list[Record]:
        number = _current_node()._sequence_nr()
        return [r for r in (ref() for ref in self.records) if r is not None and r.covers(number)]

    def together(self, name: str) -> tuple[str, ...]:
        """Return what was evaluated with a layer in the forward that is now recomputed."""
        record = _newest(self._records_of_recompute())
        return () if record is None else record.together.get(name, ())

    def _recorded(self, layer: Linked) -> list[Tensor | None]:
        """Return what `layer` read in the forward that is now recomputed."""
        records = self._records_of_recompute()
        if len({r.thread for r in records}) > 1:
            raise RuntimeError(
                f"[session] {layer.name} cannot be recomputed: forwards of several threads await "
                "their backward on one model; run each backward before the next forward"
            )
        place = (layer.chain.key, layer.position)
        record = _newest(records)
        if record is None or place not in record.reads:
            raise RuntimeError(
                f"[session] {layer.name} is recomputed, but its forward left no record of taps: "
                f"call {self.root_name or 'the model'} itself, and with torch.compile set "
                "torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True and "
                "compile the whole model with fullgraph=True"
            )
        if place in record.repeated:
            raise RuntimeError(
                f"[session] {layer.name} ran more than once in a forward and cannot be recomputed: "
                "train it without checkpointing"
            )
        return record.reads[place]

    def _refuse_reentrant(self, layer: Linked, current: ForwardPass) -> None:
        if not (current.is_grad_enabled and layer.training):
            return
        if layer.reslora_A.requires_grad:
            raise RuntimeError(
                f"[session] {layer.name} runs without gradients inside a training forward, as "
                "reentrant checkpointing does: pass use_reentrant=False to the checkpointing (in "
                "transformers gradient_checkpointing_kwargs={'use_reentrant': False})"
            )


def _read_outside(session: Session, layer: Linked) -> list[Tensor | None] | None:
    return session._read_outside(layer)


WHY_OUTSIDE = (
    "reslora: a layer with a shortcut runs outside of a call of its root module, or is recomputed "
    "in a compiled block; compile the whole model, for checkpointing with "
    "torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True"
)
# Set by `attach`: making it imports torch's compiler, which `import reslora` should not wait for.
_read_outside_of_compile: Callable[..., list[Tensor | None] | None] = _read_outside
