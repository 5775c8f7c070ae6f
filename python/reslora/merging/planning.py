"""From an adapted model to a plan of its merge: views of its tensors, and which rule serves.

The plan itself (alpha*, factors, W*) is made by the C++ library; the one function that chooses a
rule where none is named is there too (`choose_rule` in src/merge/merge_rules.cpp).
"""

from __future__ import annotations

import warnings

from torch import Tensor

from .._C import ChainView, LayerView, MergePlan, check_current, check_merge_method
from ..injection.adapted import Calibrated, Injection, evaluated_sum
from ..nn.base_layers import base_weight
from ..nn.layer import ResLoraLinear


def chain_views(
    injection: Injection, weights: dict[str, Tensor] | None = None, fits: bool = True
) -> list[ChainView]:
    """Return the tensors of every chain as the C++ library takes them.

    Args:
        injection: of the adapted model.
        weights: base weights to take instead of the layers' own, by layer.
        fits: pass on the fits at hand.

    Raises:
        ValueError: where fits are at hand that were made for other adapter values.
    """
    calibrated = injection.calibrated if fits else None
    if calibrated is not None:
        way_out = "pass data=, or clear them with calibrate(model, [])"
        check_current(calibrated.adapter_sum, evaluated_sum(injection), "merge", way_out)
    return views_with(injection, calibrated, weights)


def views_with(
    injection: Injection, calibrated: Calibrated | None, weights: dict[str, Tensor] | None = None
) -> list[ChainView]:
    """Return the same with these fits, whatever the adapter is now."""
    return [
        ChainView(
            chain.evaluated(), [_view(layer, calibrated, weights or {}) for layer in chain.layers]
        )
        for chain in injection.chains
    ]


def _view(
    layer: ResLoraLinear, calibrated: Calibrated | None, weights: dict[str, Tensor]
) -> LayerView:
    weight = weights.get(layer.name, base_weight(layer.base_layer))
    bias = getattr(layer.base_layer, "bias", None)
    return LayerView(
        None if weight is None else weight.detach(),
        layer.reslora_A.detach(),
        layer.reslora_B.detach(),
        norms=layer.norms,
        count=layer.norm_count,
        bias=bias.detach() if isinstance(bias, Tensor) else None,
        fit=None if calibrated is None else calibrated.fits.get(layer.name),
        products=layer.products if layer.norms is not None else None,
    )


def chosen_method(injection: Injection, merge_method: str | None) -> str:
    """Return the method asked for, by the call or else by the config; empty: the best at hand."""
    if merge_method is not None:
        check_merge_method(merge_method, "merge")
    return merge_method or injection.config.merge_method or ""


def warn_unfinished(injection: Injection, op: str) -> None:
    """Warn where the config asks for a finish that nothing performed."""
    share = injection.config.finish_at
    if share is not None and not injection.merges_exactly:
        warnings.warn(
            f"[{op}] finish_at is {share:g}, but the training was not finished: ResLoraCallback "
            "does it, or reslora.finish(model, batches) in a loop of your own",
            stacklevel=4,
        )


def make_plan(
    injection: Injection,
    merge_method: str | None,
    op: str,
    *,
    use_affine: bool = True,
    weights: dict[str, Tensor] | None = None,
) -> MergePlan:
    """Decide all factors without touching a weight; warn where the rule is a stopgap."""
    method = chosen_method(injection, merge_method)
    views = chain_views(injection, weights, fits=method in ("", "lsq"))
    plan = MergePlan(views, method, use_affine)
    if plan.fell_back_to_weight:
        warnings.warn(
            f"[{op}] neither calibration data nor norms of training forwards are at hand, so the "
            "rule 'weight' is used: pass data= (batches) for the rule 'lsq', or "
            "merge_method='weight' to choose it",
            stacklevel=4,
        )
    return plan
