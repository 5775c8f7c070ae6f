"""What merging changes: by layer and for the whole model, the method's error and rounding apart.

Example::

    report = merge_report(model, batches)  # the rule that merge would use; nothing is changed
    print(report)
    reslora.plots.merge_errors(report).savefig("merge.png")

The merged model is run without being merged: every layer is stood in for, once by its planned pair
beside the untouched base (the method's error alone) and once by its merged weight, rounded to the
dtype that it would be written in.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._C import LayerErrors, MergePlan, layer_errors, merged_forward, row_mask
from ..injection.adapted import Injection, check_enabled, injection_of
from ..nn.base_layers import base_weight
from ..nn.layer import ResLoraLinear
from ..progress import progress
from .batches import as_batches, call, evaluating, main_output, masks_of, moved
from .plain_bases import refuse_other_bases
from .planning import make_plan
from .report import LayerReport, MergeReport
from .stand_ins import Planned, planned_pair, standing_in


def merge_report(
    model: nn.Module,
    batches: Any,
    merge_method: str | None = None,
    *,
    progressbar: bool = False,
) -> MergeReport:
    """Measure what merging by a rule would change on some batches; the model is left as it is.

    Args:
        model: an adapted model that is not merged.
        batches: what the model is called with; padding is left out of the model's figures.
        merge_method: as in `merge`; None: the rule that `merge` would use now.
        progressbar: show a bar (needs tqdm).

    Returns:
        Errors by layer and of the model's output, KL and top-1 agreement where it gives logits.

    Cost: three forwards for each batch, and a merged matrix of each layer twice for each batch.
    """
    injection = injection_of(model, "merge_report")
    if injection.applied is not None:
        raise ValueError("[merge_report] the model must not be merged; got a merged one (unmerge)")
    refuse_other_bases(injection, "merge_report")
    plan = make_plan(injection, merge_method, "merge_report")
    report = describe(plan)
    measure(model, injection, plan, report, batches, progressbar=progressbar)
    return report


def describe(plan: MergePlan) -> MergeReport:
    """Return a plan's decisions as a report without measurements."""
    layers = [LayerReport(p.name, p.rule, list(p.alpha_star), p.residual) for p in plan.layers]
    rules = sorted({layer.rule for layer in layers} - {"exact"})
    rule = ", ".join(rules) or "exact"
    return MergeReport(layers, rule, plan.fell_back_to_weight)


class Squares:
    """Squared norms summed over calls: of the method's error, of rounding, of both, of y."""

    def __init__(self) -> None:
        self.method = self.rounding = self.both = self.whole = 0.0

    def add(self, errors: LayerErrors) -> None:
        """Add the figures of one call."""
        self.method += errors.method
        self.rounding += errors.rounding
        self.both += errors.both
        self.whole += errors.whole

    @property
    def saw_rows(self) -> bool:
        """Tell whether there was any call."""
        return self.whole != 0 or self.both != 0

    def fill_in(self, entry: LayerReport | MergeReport, has_weights: bool) -> None:
        """Write relative errors into a report; without any call they stay None."""
        if not self.saw_rows:
            return
        whole = max(self.whole, sys.float_info.min)
        entry.method_error = math.sqrt(self.method / whole)
        entry.output_error = math.sqrt(self.both / whole)
        entry.rounding_error = math.sqrt(self.rounding / whole) if has_weights else None


def measure(
    model: nn.Module,
    injection: Injection,
    plan: MergePlan,
    report: MergeReport,
    batches: Any,
    *,
    progressbar: bool,
    dense: dict[str, nn.Linear] | None = None,
) -> None:
    """Fill in every error of `report`; `dense` are layers that take the place of quantised ones."""
    check_enabled(injection, "merge_report")
    planned = list(zip(injection.layers, plan.layers, strict=True))
    bases = {x.name: (dense or {}).get(x.name, x.base_layer) for x in injection.layers}
    by_layer = {layer.name: Squares() for layer in injection.layers}
    whole, count = Squares(), 0
    has_weights = all(base_weight(base) is not None for base in bases.values())
    with evaluating(model), torch.no_grad():
        for batch in progress(as_batches(batches, "merge_report"), "measuring", progressbar):
            batch = moved(batch, model)
            masks = masks_of(model, batch, "merge_report")
            with _comparing(planned, bases, by_layer, masks):
                wanted, is_logits = _rows(call(model, batch), masks)
            with standing_in(planned, planned_pair):
                ruled, _ = _rows(call(model, batch), masks)
            merged = ruled
            if has_weights:
                with standing_in(planned, partial(_merged_stand_in, bases)):
                    merged, _ = _rows(call(model, batch), masks)
            pairs = (ruled - wanted, merged - ruled, merged - wanted, wanted)
            method, rounding, both, size = (float(t.double().square().sum()) for t in pairs)
            whole.add(LayerErrors(method, rounding, both, size))
            if is_logits:
                report.add_rows(wanted, merged)
            count += 1
    if count == 0:
        raise ValueError("[merge_report] batches must hold a batch; got none")
    uncalled = [name for name, squares in by_layer.items() if not squares.saw_rows]
    if uncalled:
        warnings.warn(
            f"[merge_report] layers must be called to be measured; got {len(uncalled)} that no "
            f"batch reaches: {', '.join(uncalled[:8])}{', ...' * (len(uncalled) > 8)} (their "
            "weights are merged all the same)",
            stacklevel=3,
        )
    whole.fill_in(report, has_weights)
    for entry in report.layers:
        by_layer[entry.name].fill_in(entry, has_weights)


def _rows(output: Any, masks: list[Tensor]) -> tuple[Tensor, bool]:
    """Return the main output as rows in fp32 (fp64 for fp64) without padding."""
    tensor, is_logits = main_output(output)
    mask = row_mask(masks, tensor.shape[:-1])
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = rows if mask is None else rows[mask.to(rows.device)]
    return (rows if rows.dtype == torch.float64 else rows.float()), is_logits


def _merged_stand_in(
    bases: dict[str, nn.Module], layer: ResLoraLinear, planned: Any
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        base = bases[layer.name]
        weight = base_weight(base)
        assert weight is not None  # measure() looks before
        bias: Tensor | None = getattr(base, "bias", None)
        return merged_forward(planned, x, weight, bias)

    return run


@contextmanager
def _comparing(
    planned: Planned, bases: dict[str, nn.Module], squares: dict[str, Squares], masks: list[Tensor]
) -> Iterator[None]:
    """Compare every call of every layer, rows of padding left out, with its planned pair."""

    def compare(layer: ResLoraLinear, entry: Any, x: Tensor, s: Tensor, y: Tensor) -> None:
        wiring = layer.wiring
        B = [layer.chain.layers[j].reslora_B for j in wiring.b]
        weight, mask = base_weight(bases[layer.name]), row_mask(masks, x.shape[:-1])
        squares[layer.name].add(layer_errors(entry, x, s, y, B, wiring.scaling, weight, mask))

    try:
        for layer, entry in planned:
            layer.observer = partial(compare, layer, entry)
        yield
    finally:
        for layer, _ in planned:
            layer.observer = None
