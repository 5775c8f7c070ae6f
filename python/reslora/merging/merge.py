"""Folding adapters into the base weights, and taking them out again.

Example::

    report = merge(model, data=batches, verify=held_out)  # W <- W*, originals kept on the CPU
    print(report)  # rule and errors of each layer and of the model
    unmerge(model)  # the exact bits come back
    model = merge_and_unload(model)  # the plain base model with merged weights

What is computed (alpha*, fits, factors, W*) is decided by the C++ plan; this file walks modules.
Everything is decided, and where asked for measured, before the first weight is written.
"""

from __future__ import annotations

import logging
import math
import numbers
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..injection.adapted import (
    Applied,
    Halted,
    Injection,
    earlier_fits_after_errors,
    injection_of,
    plain_model,
)
from ..injection.links import mixed_links
from ..injection.sharing import tied_weights
from ..nn.base_layers import base_weight
from ..nn.sharding import is_sharded
from ..progress import bar
from .batches import as_batches
from .calibration import calibrate
from .measuring import describe, measure
from .plain_bases import refuse_other_bases
from .planning import chosen_method, make_plan, warn_unfinished
from .quantized import dense_layers, note_dense
from .refinement import refine
from .report import MergeReport

logger = logging.getLogger("reslora")


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """How to merge a model: what `merge` takes, and `op`, who asks, for sentences of errors."""

    op: str
    merge_method: str | None = None
    data: Any = None
    refine_steps: int = 0
    verify: Any = None
    max_error: float | None = None
    safe_merge: bool = False
    progressbar: bool = False
    keep_originals: bool = True

    @property
    def leaves_all_open(self) -> bool:
        """Tell whether nothing is asked for that a model which is merged already could lack."""
        asked = (self.data, self.verify, self.max_error)
        return not self.refine_steps and all(value is None for value in asked)


def _check_weights(
    model: nn.Module, injection: Injection, op: str, dense: dict[str, nn.Linear]
) -> None:
    """Refuse weights that cannot be written, before anything is."""
    for layer in injection.layers:
        weight = base_weight(dense.get(layer.name, layer.base_layer))
        if weight is None or weight.is_meta:
            kind = "an offloaded weight" if weight is not None else type(layer.base_layer).__name__
            if is_sharded(getattr(layer.base_layer, "weight", None)):
                kind = "a sharded weight"
            raise ValueError(
                f"[{op}] the base of each layer must hold a plain weight; got {kind} (layer "
                f"{layer.name}); merge_and_unload(model, dequantize=True) merges into dequantised "
                "weights, `reslora merge` into the original files, export_lora needs none"
            )
        if layer.is_disabled:
            raise ValueError(f"[{op}] adapters must be enabled; got {layer.name} disabled")
    for name, others in tied_weights(model, injection).items():
        raise ValueError(
            f"[{op}] a merged weight must belong to one layer; got that of {name}, which is "
            f"{others[0]} too (export_lora leaves the weights alone)"
        )


def merge(
    model: nn.Module,
    merge_method: str | None = None,
    *,
    data: Any = None,
    refine_steps: int = 0,
    verify: Any = None,
    max_error: float | None = None,
    safe_merge: bool = False,
    progressbar: bool = False,
) -> MergeReport:
    """Write W* into the base weights; the adapters are idle until `unmerge`.

    Args:
        model: an adapted model.
        merge_method: "exact", "lsq", "projected", "input", "weight" or "factored"; None: that of
            the config, else the best rule for what is at hand: exact where it exists, then lsq
            (calibration batches, or fits of `calibrate`), then projected (sums of training
            forwards), then input (their norms alone), then weight, with a warning.
        data: calibration batches for `lsq`, and what `refine_steps` trains on.
        refine_steps: improve the fits by so many steps of distillation (see `refine`). Never done
            unasked.
        verify: batches to measure errors on before anything is written.
        max_error: refuse to merge where the relative output error on `verify` is larger.
        safe_merge: check every W* for NaN and infinity before the first is written.
        progressbar: show bars (needs tqdm).

    Returns:
        The rule of every layer and, with `verify`, the errors of every layer and of the model.

    Raises:
        ValueError: where a rule cannot serve a layer, or the error is above `max_error`; no weight
            is then changed.
    """
    request = MergeRequest(
        op="merge", merge_method=merge_method, data=data, refine_steps=refine_steps, verify=verify,
        max_error=max_error, safe_merge=safe_merge, progressbar=progressbar,
    )  # fmt: skip
    return _merge(model, request, {})


def merge_and_unload(
    model: nn.Module,
    merge_method: str | None = None,
    *,
    data: Any = None,
    refine_steps: int = 0,
    verify: Any = None,
    max_error: float | None = None,
    safe_merge: bool = False,
    dequantize: bool = False,
    progressbar: bool = False,
) -> nn.Module:
    """Merge, then remove every trace of reslora; the arguments are those of `merge`.

    The model is changed in place and returned: its modules are those from before `inject`, with
    merged weights. No originals are kept: where `max_error` or a rule refuses, the model is as it
    was, adapters and all. Where memory runs out while weights are written, RuntimeError says so,
    and the model refuses to run until a second call, which goes on. With `dequantize`, quantised
    base layers become dense `nn.Linear`s: the adapter is merged into the dequantised weights (not
    those of the original files; see quantized.py).
    """
    request = MergeRequest(
        op="merge_and_unload", merge_method=merge_method, data=data, refine_steps=refine_steps,
        verify=verify, max_error=max_error, safe_merge=safe_merge, progressbar=progressbar,
        keep_originals=False,
    )  # fmt: skip
    injection = injection_of(model, request.op)
    applied = injection.applied
    dense = {}
    if applied is None:
        if injection.halted is not None:
            dense = injection.halted.dense
        elif dequantize:
            dense = dense_layers(model, injection, request.op)
        _merge(model, request, dense)
        for layer in injection.layers:
            if layer.name in dense:
                layer.set_base(dense[layer.name])
    elif merge_method not in (None, applied.merge_method) or not request.leaves_all_open:
        raise ValueError(
            f"[merge_and_unload] the model is merged by {applied.merge_method or 'default'!r}; got "
            f"merge_method {merge_method!r}, data, refine_steps, verify or max_error (unmerge it "
            "first)"
        )
    plain = _removed(model, injection, request.op)
    if dense:
        note_dense(plain)
    return plain


def _removed(model: nn.Module, injection: Injection, how: str) -> nn.Module:
    """Remove the adapters, or let PEFT do it where it wrapped the model."""
    if hasattr(model, "peft_config") and hasattr(model, how):
        return getattr(model, how)()
    injection.undo()
    return plain_model(model)


def merge_for_good(model: nn.Module, op: str, *, safe_merge: bool, progressbar: bool) -> None:
    """Merge by the best rule for what is at hand and keep no originals."""
    request = MergeRequest(
        op=op, safe_merge=safe_merge, progressbar=progressbar, keep_originals=False
    )
    _merge(model, request, {})


def _merge(model: nn.Module, request: MergeRequest, dense: dict[str, nn.Linear]) -> MergeReport:
    """Merge; `dense` holds what takes the place of quantised layers."""
    op = request.op
    injection = injection_of(model, op)
    if injection.applied is not None:
        raise ValueError(f"[{op}] adapters must not be merged yet; got a merged model (unmerge it)")
    if injection.halted is not None:
        return _go_on(injection, injection.halted, request)
    _check_limits(request)
    _check_weights(model, injection, op, dense)
    refuse_other_bases(injection, op, set(dense))
    with earlier_fits_after_errors(injection):
        prepare(model, injection, request)
        weights = {name: layer.weight for name, layer in dense.items()}
        plan = make_plan(injection, request.merge_method, op, weights=weights)
        _warn_mixed(model, op)
        if not request.keep_originals:
            warn_unfinished(injection, op)
        report = describe(plan)
        if request.verify is not None:
            measure(
                model, injection, plan, report, request.verify,
                progressbar=request.progressbar, dense=dense,
            )  # fmt: skip
            _refuse_error(op, report, request.max_error)
        method = chosen_method(injection, request.merge_method)
        interrupt = _apply(injection, Halted(plan, method, dense), request)
    if interrupt is not None:
        raise interrupt
    logger.info("[%s] merged\n%s", op, report)
    return report


def _go_on(injection: Injection, halted: Halted, request: MergeRequest) -> MergeReport:
    """Write the rest of a merge that failed."""
    if request.merge_method not in (None, halted.merge_method) or not request.leaves_all_open:
        raise ValueError(
            f"[{request.op}] a merge that failed goes on as it was begun, by "
            f"{halted.merge_method or 'default'!r}; got merge_method {request.merge_method!r}, "
            "data, refine_steps, verify or max_error"
        )
    weights, biases = live_tensors(injection)  # of a model that was moved, others than the plan's
    for i, layer in enumerate(injection.layers):
        if layer.name in halted.dense:
            weights[i] = halted.dense[layer.name].weight.detach()
    halted.plan.go_on_with(weights, biases)
    interrupt = _apply(injection, halted, request)
    if interrupt is not None:
        raise interrupt
    return describe(halted.plan)


Maybe = list[Tensor | None]


def live_tensors(injection: Injection) -> tuple[Maybe, Maybe]:
    """Return the weight and bias of each layer as they are now."""
    weights = [base_weight(layer.base_layer) for layer in injection.layers]
    biases = [getattr(layer.base_layer, "bias", None) for layer in injection.layers]
    return [w if w is None else w.detach() for w in weights], [
        b if b is None else b.detach() for b in biases
    ]


def _apply(injection: Injection, made: Halted, request: MergeRequest) -> BaseException | None:
    """Write every W*. Without originals nothing could be put back: an interrupt then waits."""
    waiting: list[BaseException] = []
    plan = made.plan
    with bar(request.progressbar, "merging", len(plan.layers)) as shown:

        def show(done: int) -> None:
            try:
                shown.update(done - shown.n)
            except BaseException as error:
                if request.keep_originals:
                    raise
                waiting.append(error)

        try:
            plan.apply(
                keep_originals=request.keep_originals, safe_merge=request.safe_merge, progress=show
            )
        except BaseException as error:
            if not plan.done:
                raise
            injection.halt(made)
            cause = str(error).partition("\n")[0]
            raise RuntimeError(f"[{request.op}] {cause}; this leaves a model {made}") from error
    injection.halted = None
    for layer in injection.layers:
        layer.stand_in, layer.is_merged = None, True
    injection.applied = Applied(plan, made.merge_method)
    return waiting[0] if waiting else None


def prepare(model: nn.Module, injection: Injection, request: MergeRequest) -> None:
    """Calibrate and refine where data for it is given and the method can use it."""
    op, data = request.op, request.data
    method = chosen_method(injection, request.merge_method)
    if data is None:
        if request.refine_steps:
            raise ValueError(f"[{op}] refine_steps needs batches; got data=None")
        return
    if method not in ("", "lsq"):
        raise ValueError(
            f"[{op}] data serves the rule 'lsq'; got merge_method {method!r} (leave data out, or "
            "use 'lsq')"
        )
    if injection.merges_exactly:
        return
    batches = as_batches(data, op)
    if request.refine_steps and iter(batches) is batches:
        raise ValueError(
            f"[{op}] data is read twice, to calibrate and to refine; got an iterator that can be "
            "read once: pass a list or a DataLoader"
        )
    calibrate(model, data, progressbar=request.progressbar)
    if request.refine_steps:
        refine(model, data, request.refine_steps, progressbar=request.progressbar)


def _check_limits(request: MergeRequest) -> None:
    op, max_error = request.op, request.max_error
    if max_error is None:
        return
    if request.verify is None:
        raise ValueError(f"[{op}] max_error needs batches to measure on; got verify=None")
    is_number = isinstance(max_error, numbers.Real)
    if not (is_number and math.isfinite(max_error) and max_error >= 0):
        raise ValueError(f"[{op}] max_error must be a number of at least 0; got {max_error!r}")


def _refuse_error(op: str, report: MergeReport, max_error: float | None) -> None:
    error = report.output_error
    if max_error is None or (error is not None and error <= max_error):
        return
    raise ValueError(
        f"[{op}] the relative output error on verify must be at most max_error {max_error:g}; got "
        f"{'none' if error is None else format(error, '.3g')} by {report.rule} (nothing was "
        "merged: give calibration data, refine_steps, or a higher limit)"
    )


def unmerge(model: nn.Module) -> None:
    """Restore the exact bits that `merge` replaced."""
    unmerge_adapters(injection_of(model, "unmerge"))


def unmerge_adapters(injection: Injection) -> None:
    """Restore the weights of the layers of one adapter."""
    if injection.applied is None:
        raise ValueError("[unmerge] adapters must be merged; got a model that is not")
    if injection.applied.plan is None:
        raise ValueError(
            "[unmerge] the originals must be at hand; got a copy of a merged model (unmerge the "
            "model that was merged, or copy it before)"
        )
    injection.applied.plan.revert(*live_tensors(injection))  # a model may have been moved since
    injection.applied = None
    for layer in injection.layers:
        layer.is_merged = False


def unload(model: nn.Module) -> nn.Module:
    """Drop the adapters and return the base model as it was, `modules_to_save` as trained."""
    injection = injection_of(model, "unload")
    if injection.applied is not None:
        unmerge_adapters(injection)
    return _removed(model, injection, "unload")


def _warn_mixed(model: nn.Module, op: str) -> None:
    mixed = mixed_links(model)
    if mixed:
        warnings.warn(
            f"[{op}] {len(mixed)} layers were trained with their link in some forwards and without "
            f"it in others ({mixed[0]}, ...): no rule sees that; print_links(model) counts them",
            stacklevel=4,
        )
