"""What passes between the layers of a chain while a model runs.

A pass (see passes.py) is one forward of the chain's root module, opened by a pre-hook of the root
and closed by a hook that also runs after an exception. A tap that is missing or of another shape is
left out: that layer runs plain, and it is counted.

A recompute (see recompute.py) calls layers while the backward runs, without the root. They find
what the same call read in the forward; where that is not known it is an error, never a plain layer.

Example (what `inject` does)::

    session = Session("model")
    session.attach(model.model)  # hooks; session.detach() removes them
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import recompute
from .passes import Call, ForwardPass, Linked, Waiting, drop_interrupted, is_running, leave_out
from .recompute import NO_GRAPH_TASK, Record, Recorded, Region, graph_task

NOT_CALLED = "the root was not called"


class _PerThread(threading.local):
    """The open passes of a thread, inner ones last."""

    def __init__(self) -> None:
        self.thread = object()  # threading.get_ident() may name a later thread too
        self.passes: list[ForwardPass] = []
        self.ahead: list[Waiting] = []  # as that of a pass, for a recompute


class Session:
    """Opens and closes the passes of one root module and serves the taps of its chains."""

    def __init__(self, root_name: str) -> None:
        self.root_name = root_name
        self.handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.open = _PerThread()
        self.lock = threading.Lock()  # of `records`
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

    # ---- Passes

    def begin(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Open a fresh pass (forward pre-hook of the root)."""
        is_grad_enabled = torch.is_grad_enabled()
        passes = self.open.passes  # changed in place: torch.compile traces no attribute of a thread
        if torch.compiler.is_compiling():
            passes.append(ForwardPass(NO_GRAPH_TASK, is_grad_enabled, None, None))
            return
        frame = sys._getframe(1)
        if passes:
            drop_interrupted(passes, frame)
        record = None
        if is_grad_enabled and recompute.CAN_RECOMPUTE:
            record = Record(self.open.thread)
            with self.lock:
                self.records = [ref for ref in self.records if ref() is not None]
                self.records.append(weakref.ref(record))
        passes.append(ForwardPass(graph_task(), is_grad_enabled, record, frame))

    def finish(self, root: nn.Module, args: Any, output: Any) -> None:
        """Close the pass of a call (forward hook of the root, also called after an exception)."""
        passes = self.open.passes
        if not passes:
            return
        is_compiling = torch.compiler.is_compiling()
        if len(passes) > 1 and not is_compiling:
            frame = sys._getframe(1)
            while any(p.frame is frame for p in passes[:-1]):
                passes.pop()  # left by an interrupt inside of this call
        closed = passes.pop()
        if closed.record is not None:
            closed.record.close()
        if output is None:  # an exception was raised
            return
        self.drop_ahead(closed.ahead, is_finished=True)
        if closed.is_repeating:
            leave_out(closed, is_compiling)

    def drop_ahead(self, slot: list[Any], is_finished: bool) -> None:
        """Forget what was computed ahead; in a forward that is finished nobody will take it."""
        if slot and is_finished:
            slot[0].drop()
        slot.clear()

    def current(self, is_compiling: bool) -> ForwardPass | None:
        """Return the pass that this thread has open for the running graph task, if any."""
        passes = self.open.passes
        if not passes:
            return None
        if len(passes) > 1 and not is_compiling:
            drop_interrupted(passes, sys._getframe(1))
        newest = passes[-1]
        if newest.frame is not None and not is_compiling and not is_running(newest.frame):
            passes.clear()  # an interrupt ended the call, and nothing has begun since
            return None
        return newest if is_compiling or newest.task == graph_task() else None

    # ---- Calls of layers

    def enter(self, layer: Linked) -> Call:
        """Begin a call of `layer`."""
        is_compiling = torch.compiler.is_compiling()
        current = self.current(is_compiling)
        place = (layer.chain.key, layer.position)
        if current is not None:
            recorded = None
            if current.record is not None and not is_compiling:
                recorded = current.record.add(self, place)
            return Call(current, current.enter(place), recorded, current.ahead)
        recorded = None
        if not is_compiling and graph_task() != NO_GRAPH_TASK:
            recorded = self._upcoming(layer, advance=True)
        return Call(None, 0, recorded, self.open.ahead)

    def read(self, layer: Linked, x: Tensor, call: Call) -> list[Tensor]:
        """Return the taps that `layer` adds: those it is wired to that fit x [..., in]."""
        is_compiling = torch.compiler.is_compiling()
        current = call.current
        if current is None:
            read_outside = _read_outside_of_compile if is_compiling else _read_outside
            kept = read_outside(self, layer, call.recorded)
            return [] if kept is None else self._fitting(layer, kept, x, False)
        if not torch.is_grad_enabled():
            self._refuse_reentrant(layer, current)
        found = current.taps_of(layer, call.number)
        current.note_read(layer, call.number)
        taps = self._fitting(layer, found, x, is_compiling or current.task == NO_GRAPH_TASK)
        if call.recorded is not None:
            call.recorded.keep(found)
        return taps

    def peek(self, layer: Linked, x: Tensor, current: ForwardPass | None) -> list[Tensor]:
        """Return what `read` will in the next call of `layer`, without a trace of it."""
        if not layer.wiring.taps:
            return []
        if current is not None:
            number = current.calls.get((layer.chain.key, layer.position), 0)
            return self._fitting(layer, current.taps_of(layer, number), x, False)
        recorded = self._upcoming(layer)
        return [] if recorded is None else self._fitting(layer, recorded.taps, x, False)

    def write(self, layer: Linked, tap: Tensor, y: Tensor, call: Call) -> None:
        """Keep what `layer` hands on for the rest of the pass; the record lives as long as y."""
        current = call.current
        if current is None:
            return
        if layer.wiring.handed != "nothing":
            current.taps[layer.chain.key, layer.position, call.number] = (
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
            if j in layer.left_out:
                reason = layer.left_out[j]
            elif tap is None:
                reason = f"{layer.chain.names[j]} did not run before it"
            elif tap.shape[:-1] != rows:
                reason = f"{layer.chain.names[j]} ran on another number of tokens"
            if tap is not None and tap.shape[:-1] == rows:
                taps.append(tap)
            if is_forward:
                layer.count_link(reason)
        return taps

    # ---- Recomputes

    def _source(self, layer: Linked) -> Region | Record | None:
        """Return where the calls of the forward stand that is now recomputed."""
        region = recompute.region_of_recompute(self)
        if region is not None:
            return region
        with self.lock:
            alive = [record for record in (ref() for ref in self.records) if record is not None]
        records = recompute.records_of_recompute(alive)
        if len({record.thread for record in records}) > 1:
            raise RuntimeError(
                f"[session] {layer.name} cannot be recomputed: forwards of several threads await "
                "their backward on one model, and other hooks for saved tensors hide the "
                "checkpoint; run each backward before the next forward"
            )
        return records[-1] if records else None

    def _upcoming(self, layer: Linked, advance: bool = False) -> Recorded | None:
        """Return what the next call of `layer` in this recompute read in the forward."""
        source, place = self._source(layer), (layer.chain.key, layer.position)
        if source is None:
            return None
        if layer.wiring.taps and source.is_unclear(place):
            raise RuntimeError(
                f"[session] {layer.name} ran more than once in a forward, inside of nested "
                "checkpoints or of hooks for saved tensors, and cannot be recomputed: train it "
                "without checkpointing"
            )
        recorded = source.upcoming(place)
        if advance:
            source.advance(place)
        return recorded

    def _read_outside(self, layer: Linked, recorded: Recorded | None) -> list[Tensor | None] | None:
        """Serve a layer that was called while no pass is open here."""
        if graph_task() != NO_GRAPH_TASK:
            recorded = recorded or self._upcoming(layer, advance=True)
            if recorded is None:
                raise RuntimeError(
                    f"[session] {layer.name} is recomputed, but its forward left no record of "
                    f"taps: call {self.root_name or 'the model'} itself, and with torch.compile "
                    "set torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = "
                    "True and compile the whole model with fullgraph=True"
                )
            return recorded.taps
        if not recompute.CAN_RECOMPUTE and layer.training and torch.is_grad_enabled():
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

    def _refuse_reentrant(self, layer: Linked, current: ForwardPass) -> None:
        if not (current.is_grad_enabled and layer.training):
            return
        if layer.reslora_A.requires_grad:
            raise RuntimeError(
                f"[session] {layer.name} runs without gradients inside a training forward, as "
                "reentrant checkpointing does: pass use_reentrant=False to the checkpointing (in "
                "transformers gradient_checkpointing_kwargs={'use_reentrant': False}), or, where "
                "the model does so by itself (reversible layers), use res_mode 'none' or 'bs'"
            )


def _read_outside(
    session: Session, layer: Linked, recorded: Recorded | None
) -> list[Tensor | None] | None:
    return session._read_outside(layer, recorded)


WHY_OUTSIDE = (
    "reslora: a layer with a shortcut runs outside of a call of its root module, or is recomputed "
    "in a compiled block; compile the whole model, for checkpointing with "
    "torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True"
)
# Set by `attach`: making it imports torch's compiler, which `import reslora` should not wait for.
_read_outside_of_compile: Callable[..., list[Tensor | None] | None] = _read_outside
